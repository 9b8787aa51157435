"""Networks that turn pictures into features or scores, each from its own published weights."""
