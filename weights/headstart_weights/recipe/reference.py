"""What the training pictures look like to the scorer: mean and covariance of its unit features.

The Frechet distance of a set of samples is taken to these, so anyone can compute it without the
artwork.
"""

from __future__ import annotations

import logging

import torch

from headstart.metrics.scorer import load_scorer
from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.codec import to_pixels
from headstart_weights.recipe.dataset import load_dataset
from headstart_weights.recipe.training import write_tensors

log = logging.getLogger(__name__)


@torch.no_grad()
def main(options: StageOptions) -> None:
    """The `reference` stage: writes `reference.safetensors`, mean [D] and covariance [D, D]."""
    scorer = load_scorer(options.work / "scorer.safetensors")
    images = load_dataset(options.work).images
    batches = (images[i : i + 64] for i in range(0, len(images), 64))
    features = torch.cat([scorer.features(to_pixels(batch)) for batch in batches]).double()
    tensors = {"mean": features.mean(0).float(), "covariance": torch.cov(features.T).float()}
    write_tensors(tensors, options.work / "reference.safetensors", {"pictures": str(len(images))})
    log.info("reference: features of %d pictures", len(images))
