"""``python -m nl_models``: the commands of ``nl``."""

from nl_models.cli import app

app()
