"""What a run costs on a card, counted and not measured: FLOPs, bytes, launches, and their floor."""
