"""Plans, strengths and methods side by side."""
