"""What the models are worth: tasks of the literature, small, beside the scores published for them."""
