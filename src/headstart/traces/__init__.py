"""What every step is aiming at: its numbers, and how it is drawn."""
