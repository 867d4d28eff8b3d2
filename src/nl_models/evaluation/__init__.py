"""What a trained model is worth beyond its training window: losses by position, of text and of its own."""
