"""LoRAs, sliders, fine-tunes: read as data, live on both models, carried from one to the other."""
