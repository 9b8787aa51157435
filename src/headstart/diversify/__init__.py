"""Other ways to varied images, on any plan: each is data that says what it changes of a run."""
