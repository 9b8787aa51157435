"""The paper's experiments on any pair: what each measures, and its numbers over prompts."""
