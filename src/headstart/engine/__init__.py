"""Networks kept warm: prompts in, a trajectory out, a record run again."""
