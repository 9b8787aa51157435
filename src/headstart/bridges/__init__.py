"""Other packages' networks, prompts and samplers used with ours; none is loaded before its use."""
