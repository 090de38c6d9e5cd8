"""What all quantisers share: shapes, refusals, the straight-through step, counts, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqrae_ds.models.ema_codebook import EMACodebook
from vqrae_ds.models.quantizer import CodebookStatistics, Quantizer, codebook_statistics
from vqrae_ds.models.simvq import SimVQ
from vqrae_ds.ops.nearest_code import CodeNorms

K, D = 50, 12
Make = Callable[..., Quantizer]


@pytest.fixture(params=[SimVQ, EMACodebook])
def make(request: pytest.FixtureRequest) -> Make:
    def make(**options: object) -> Quantizer:
        torch.manual_seed(0)
        return request.param(K, D, **options).eval()

    return make


def random_z(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def all_codes(quantizer: Quantizer) -> Tensor:
    return quantizer.get_codebook_entry(torch.arange(K)).detach()


class TestForward:
    def test_images_and_token_rows_are_quantised_alike(self, make: Make) -> None:
        quantizer, z = make(), random_z(2, D, 3, 5)
        image, tokens = quantizer(z), quantizer(z.flatten(2).transpose(1, 2))
        assert image.z_q.shape == z.shape and image.indices.shape == (2, 3, 5)
        assert torch.equal(image.z_q.flatten(2).transpose(1, 2), tokens.z_q)
        assert torch.equal(image.indices.flatten(1), tokens.indices)
        assert torch.equal(image.vq_loss, tokens.vq_loss)
        entries = quantizer.get_codebook_entry(image.indices)
        assert torch.equal(entries, image.z_q.permute(0, 2, 3, 1))

    def test_the_output_unpacks_as_specified(self, make: Make) -> None:
        z_q, vq_loss, indices = make()(random_z(2, D, 3, 5))
        assert z_q.dtype == torch.float32 and vq_loss.ndim == 0 and indices.dtype == torch.int64

    @pytest.mark.parametrize("shape", [(2, 9), (2, D + 1, 3, 3), (2, 9, D + 1), (2, 3, 3, D)])
    def test_other_shapes_are_refused(self, make: Make, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=rf"\({', '.join(map(str, shape))}\)"):
            make()(torch.zeros(shape))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_finite_are_refused(self, make: Make, value: float) -> None:
        z = random_z(2, D, 3, 5)
        z[1, 2, 0, 4] = z[1, 3, 0, 4] = z[1, 0, 2, 2] = value
        with pytest.raises(ValueError, match=r"3 of 360 values .* token \(1, 4\).* diverged"):
            make()(z)
        with pytest.raises(ValueError, match=r"3 of 360 .* \(1, 4\)"):
            make().check_finite(z.flatten(2).transpose(1, 2))
        make().check_finite(random_z(2, 9, D))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_training_is_not_stopped_on_one_rank_alone(self, make: Make, value: float) -> None:
        """Its loss is not finite, the rest is of the usual form."""
        quantizer, z_BND = make().train(), random_z(2, 9, D)
        z_BND[1, 4, 2] = value
        quantized = quantizer.quantize(z_BND)
        assert not quantized.vq_loss.isfinite()
        assert ((quantized.indices_BN >= 0) & (quantized.indices_BN < K)).all()


def any_codes(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
    """A search that finds the last code always, and looks at nothing, as the search on a GPU."""
    assert norms.half_norms_K.shape == (len(codes_KD),)
    return torch.full((len(z_ND),), len(codes_KD) - 1)


class ReadBack(TorchDispatchMode):
    """Fails where a value is read into Python: on a GPU the host would wait for the device."""

    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.READS, "a value is read back"
        return func(*args, **(kwargs or {}))


class TestQuantize:
    def test_the_value_is_the_code_and_the_gradient_that_of_z(self, make: Make) -> None:
        quantizer, z_BND = make(), (100 + random_z(2, 9, D)).requires_grad_()
        quantized = quantizer.quantize(z_BND)
        assert torch.equal(quantized.z_q_BND, quantizer.get_codebook_entry(quantized.indices_BN))
        weight_BND = torch.randn_like(z_BND)
        (quantized.z_q_BND * weight_BND).sum().backward()
        assert torch.equal(z_BND.grad, weight_BND)
        assert all(parameter.grad is None for parameter in quantizer.parameters())

    def test_z_q_has_the_dtype_of_the_input_and_the_loss_is_fp32(self, make: Make) -> None:
        quantizer = make()
        quantized = quantizer.quantize(random_z(2, 9, D).bfloat16())
        assert quantized.z_q_BND.dtype == torch.bfloat16
        assert torch.equal(quantized.z_q_BND, quantized.code_BND.bfloat16())
        assert quantized.vq_loss.dtype == torch.float32

    def test_nothing_is_read_back_from_the_device(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # On the CPU, and there alone, the function of torch looks at its input.
        monkeypatch.setattr(F, "one_hot", lambda x, num: (x[..., None] == torch.arange(num)).long())
        for quantizer in (make(search=any_codes), make(search=any_codes).train()):
            z_BND = random_z(2, 9, D).requires_grad_()
            with ReadBack():
                quantized = quantizer.quantize(z_BND)
                (quantized.z_q_BND.sum() + quantized.vq_loss).backward()
        with pytest.raises(AssertionError, match="read back"), ReadBack():
            quantizer.check_finite(z_BND)

    def test_the_search_can_be_replaced(self, make: Make) -> None:
        assert (make(search=any_codes)(random_z(2, 9, D)).indices == K - 1).all()


class TestCodebook:
    def test_every_code_finds_itself(self, make: Make) -> None:
        quantizer = make()
        assert torch.equal(quantizer.find_codes(all_codes(quantizer)[None]), torch.arange(K)[None])

    @pytest.mark.parametrize("index", [-1, K])
    def test_an_index_outside_the_codebook_is_named(self, make: Make, index: int) -> None:
        with pytest.raises(ValueError, match=rf"index {index} .* 0 to {K - 1}"):
            make().get_codebook_entry(torch.tensor([[0, index]]))

    def test_indices_of_any_shape_have_codes(self, make: Make) -> None:
        quantizer = make()
        for shape in ((), (3,), (0, 4), (2, 3, 4)):
            assert quantizer.get_codebook_entry(torch.zeros(shape).long()).shape == (*shape, D)

    def test_resets_draw_all_that_is_stored(self, make: Make) -> None:
        quantizer = make()
        stored = quantizer.state_dict()
        for tensor in stored.values():
            tensor.zero_()
        torch.manual_seed(0)
        for _, reset in quantizer.resets():
            reset()
        torch.manual_seed(0)
        expected = type(quantizer)(K, D).state_dict()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)
        drawn = [module for module, _ in quantizer.resets()]
        assert sum(len(module.state_dict()) for module in drawn) == len(expected)

    def test_a_model_built_without_values_equals_the_one_that_was_saved(self, make: Make) -> None:
        quantizer, z_BND = make(), random_z(2, 9, D)
        with torch.device("meta"):
            loaded = type(quantizer)(K, D)
        loaded = loaded.to_empty(device="cpu").eval()
        for buffer in loaded.buffers():
            buffer.fill_(True if buffer.dtype == torch.bool else 7)
        loaded.load_state_dict(quantizer.state_dict())
        loaded.reset_unsaved_buffers()
        buffers = dict(quantizer.named_buffers())
        assert all(torch.equal(b, buffers[name]) for name, b in loaded.named_buffers())
        for found, expected in zip(loaded(z_BND), quantizer(z_BND), strict=True):
            assert torch.equal(found, expected)


class TestStatistics:
    def test_codes_are_counted_until_the_reset(self, make: Make) -> None:
        quantizer = make()
        codes_KD = all_codes(quantizer)
        assert quantizer.get_codebook_usage() == 0
        quantizer(codes_KD[None, :10])
        quantizer.find_codes(codes_KD[None, 5:20])
        assert quantizer.code_counts.tolist() == 5 * [1] + 5 * [2] + 10 * [1] + 30 * [0]
        assert quantizer.get_codebook_usage() == 20 / K
        quantizer.reset_codebook_usage()
        assert quantizer.get_codebook_usage() == 0

    def test_those_of_all_ranks_leave_the_own_counts_alone(self, make: Make) -> None:
        quantizer = make()
        quantizer.code_counts[:2] = 3
        assert quantizer.get_codebook_statistics() == pytest.approx((2 / K, 2, K - 2))

        def all_reduce(counts_K: Tensor) -> None:
            counts_K += 3 * (torch.arange(K) == 2)  # the other rank has used code 2

        assert quantizer.get_codebook_statistics(all_reduce) == pytest.approx((3 / K, 3, K - 3))
        assert quantizer.code_counts.sum() == 6

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
    def test_statistics_of_counts(self, dtype: torch.dtype) -> None:
        found = codebook_statistics(torch.tensor([50, 50, 0, 0], dtype=dtype))
        assert found == (0.5, pytest.approx(2), 2)
        entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        found = codebook_statistics(torch.tensor([9, 1, 0], dtype=dtype))
        assert found == (pytest.approx(2 / 3), pytest.approx(math.exp(entropy)), 1)
        assert codebook_statistics(torch.ones(7, dtype=dtype)) == (1, pytest.approx(7), 0)

    def test_where_no_code_was_used_there_is_no_nan(self) -> None:
        assert codebook_statistics(torch.zeros(4)) == CodebookStatistics(0.0, 0.0, 4)
