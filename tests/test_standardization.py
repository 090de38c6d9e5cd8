"""What the calibrated standardisation is for: SimVQ trained on features that share an offset.

Features are a stand-in for InternViT's, whose last block has no norm: a mixture in a few
directions, far from zero by an offset that all tokens share. The optimizer is that of
ds_configs/stage1_zero3.json, in the first 500 steps of its warm-up.

What is found, and no more: with the offset a handful of codes is in use. SimVQ alone does not get
out of it in 500 steps. With a layer before it it learns its way out, but only after hundreds of
steps in which one code stands for everything; features in small units need more steps still. A
LayerNorm is no way out: it scales the offset to 1, and what differs between tokens to nearly
nothing. Standardised features use the codebook from the first step, whatever their offset and unit.

Shapes: N tokens of a step, D width of the features, F directions in which they vary, E codebook
dimension, K codes.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.models.quantizer import codebook_statistics
from vqrae_ds.models.simvq import SimVQ
from vqrae_ds.models.vqrae import Standardize

pytestmark = pytest.mark.slow

STEPS, WARMUP_STEPS, LEARNING_RATE = 500, 2000, 1e-3
TOKENS, WIDTH, DIRECTIONS, EMBEDDING_DIM, NUM_CODES = 512, 96, 16, 48, 1024
OFFSET = 20.0  # of a channel, in units of its standard deviation


class Trained(NamedTuple):
    """Usages are those of the first step, of steps 81 to 100, and of the last 20."""

    first_usage: float
    early_usage: float
    usage: float
    explained: float  # share of the tokens' variance that a linear read-out has from the codes


class Features:
    """Fresh tokens each step: 256 clusters in F directions, a little noise, and the offset."""

    def __init__(self, unit: float, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.unit = unit
        self.centres_256F = self._normal(256, DIRECTIONS)
        self.mixing_FD = self._normal(DIRECTIONS, WIDTH) / DIRECTIONS**0.5
        self.offset_D = OFFSET * self._normal(WIDTH).sign()

    def draw(self) -> tuple[Tensor, Tensor]:
        """What varies, (N, F) with variance 1, and the features (N, D) that show it."""
        cluster_N = torch.randint(256, (TOKENS,), generator=self.generator)
        hidden_NF = self.centres_256F[cluster_N] + 0.5 * self._normal(TOKENS, DIRECTIONS)
        hidden_NF = hidden_NF / 1.25**0.5
        features_ND = hidden_NF @ self.mixing_FD + 0.1 * self._normal(TOKENS, WIDTH)
        return hidden_NF, self.unit * (features_ND + self.offset_D)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def calibrated(features: Features) -> Standardize:
    features_ND = torch.cat([features.draw()[1] for _ in range(8)])
    standardize = Standardize(WIDTH)
    standardize.mean.copy_(features_ND.mean(0))
    standardize.std.copy_(features_ND.std(0))
    return standardize


def train(kind: str, unit: float = 1.0, seed: int = 0) -> Trained:
    """Layer in, SimVQ with its defaults, linear read-out; `kind` comes before them."""
    torch.manual_seed(seed)
    features = Features(unit, seed)
    kinds = {"nothing": nn.Identity, "LayerNorm": lambda: nn.LayerNorm(WIDTH)}
    before = calibrated(features) if kind == "standardised" else kinds[kind]()
    in_proj, simvq = nn.Linear(WIDTH, EMBEDDING_DIM), SimVQ(NUM_CODES, EMBEDDING_DIM)
    read_out = nn.Linear(EMBEDDING_DIM, DIRECTIONS)
    modules = nn.ModuleList([before, in_proj, simvq, read_out])
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4)
    counts_K: list[Tensor] = []
    for step in range(STEPS):
        hidden_NF, features_ND = features.draw()
        quantized = simvq.quantize(in_proj(before(features_ND))[None])
        error = F.mse_loss(read_out(quantized.z_q_BND)[0], hidden_NF)
        optimizer.zero_grad()
        (error + quantized.vq_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (step + 1) / WARMUP_STEPS
        optimizer.step()
        counts_K.append(simvq.code_counts.clone())
        simvq.reset_codebook_usage()
    windows = (counts_K[:1], counts_K[80:100], counts_K[-20:])
    usages = (codebook_statistics(torch.stack(window).sum(0)).usage for window in windows)
    return Trained(*usages, explained=1 - error.item())


def usage_of_simvq_alone(kind: str, steps: int = STEPS) -> float:
    """Of 2,048 codes after `steps` steps, over the last 20; without layers before or behind.

    The offset is 5 standard deviations. The learning rate has no warm-up.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    offset_D = 5.0 * torch.randn(64, generator=generator).sign()

    def draw(num_tokens: int) -> Tensor:
        return torch.randn(num_tokens, 64, generator=generator) + offset_D

    before = {"nothing": nn.Identity(), "LayerNorm": nn.LayerNorm(64), "standardised": None}[kind]
    if before is None:
        before, features_ND = Standardize(64), draw(8192)
        before.mean.copy_(features_ND.mean(0))
        before.std.copy_(features_ND.std(0))
    simvq = SimVQ(2048, 64)
    optimizer = torch.optim.AdamW(simvq.embedding_proj.parameters(), lr=LEARNING_RATE)
    for step in range(steps):
        if step == steps - 20:
            simvq.reset_codebook_usage()
        with torch.no_grad():
            z_1ND = before(draw(1024))[None]
        optimizer.zero_grad()
        simvq.quantize(z_1ND).vq_loss.backward()
        optimizer.step()
    return simvq.get_codebook_usage()


def test_simvq_alone_uses_ten_times_the_codes_with_it() -> None:
    with_it = usage_of_simvq_alone("standardised")
    assert with_it > 0.5
    assert with_it > 10 * usage_of_simvq_alone("nothing")
    assert with_it > 10 * usage_of_simvq_alone("LayerNorm")


@pytest.fixture(scope="module")
def standardised() -> Trained:
    return train("standardised")


def test_standardised_features_use_the_codebook_from_the_first_step(standardised: Trained) -> None:
    assert standardised.first_usage > 0.1, "of 512 tokens for 1024 codes"
    assert min(standardised.early_usage, standardised.usage) > 0.3
    assert standardised.explained > 0.15


def test_without_it_hundreds_of_steps_are_lost(standardised: Trained) -> None:
    """Not for good: at the end of the 500 the usage is no lower."""
    raw = train("nothing")
    assert standardised.first_usage > 10 * raw.first_usage
    assert standardised.early_usage > 10 * raw.early_usage
    assert raw.usage > standardised.usage / 2


def test_without_it_features_in_small_units_stay_at_a_single_code(standardised: Trained) -> None:
    raw = train("nothing", unit=0.03)
    assert standardised.usage > 10 * raw.usage
    assert standardised.explained > 10 * raw.explained


def test_a_layer_norm_is_no_replacement(standardised: Trained) -> None:
    normed = train("LayerNorm")
    assert standardised.first_usage > 10 * normed.first_usage
    assert standardised.early_usage > 10 * normed.early_usage
    assert standardised.usage > 10 * normed.usage
    assert standardised.explained > 10 * normed.explained
