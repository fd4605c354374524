"""Losses against references in double precision, known values, invariances and geomloss."""

import itertools

import pytest
import torch
from geomloss import SamplesLoss

from esm_perturb.core.config import InputError
from esm_perturb.models.losses import auto_blur, energy_distance, mse, set_loss, sinkhorn

BOTH = pytest.mark.parametrize("unbiased", [True, False], ids=["U", "V"])


def by_loops(x: torch.Tensor, y: torch.Tensor, unbiased: bool) -> float:
    """Energy distance of one set, one pair at a time, in Python's doubles."""

    def mean_inner(cells: list[list[float]]) -> float:
        n = len(cells)
        return (
            2
            * sum(itertools.starmap(distance, itertools.combinations(cells, 2)))
            / (n * (n - 1) if unbiased else n * n)
        )

    def distance(a: list[float], b: list[float]) -> float:
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5

    x, y = x.tolist(), y.tolist()
    across = sum(itertools.starmap(distance, itertools.product(x, y))) / (len(x) * len(y))
    return across - 0.5 * mean_inner(x) - 0.5 * mean_inner(y)


def in_double(x: torch.Tensor, y: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """Energy distance of one set from explicit differences, differentiable, with no gradient between copies."""

    def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        squared = (a[:, None] - b[None]).square().sum(-1)
        return torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)

    def inner(cells: torch.Tensor) -> torch.Tensor:
        n = len(cells)
        return distances(cells, cells).sum() / (max(n * (n - 1), 1) if unbiased else n * n)

    x, y = x.double(), y.double()
    return distances(x, y).mean() - 0.5 * inner(x) - 0.5 * inner(y)


def value_and_gradients(loss, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value.sum(), inputs)


@BOTH
def test_energy_equals_double_loops_and_its_gradient_their_differences(unbiased):
    torch.manual_seed(0)
    x, y = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    value, *gradients = value_and_gradients(lambda x, y: energy_distance(x, y, unbiased=unbiased), x, y)
    assert value.item() == pytest.approx(by_loops(x[0], y[0], unbiased), abs=1e-6)
    pair, step = (x[0].double(), y[0].double()), 1e-5
    for side, gradient in enumerate(gradients):
        for cell, gene in itertools.product(range(len(pair[side])), range(4)):
            ends = []
            for sign in (1, -1):
                moved = [each.clone() for each in pair]
                moved[side][cell, gene] += sign * step
                ends.append(by_loops(*moved, unbiased))
            assert gradient[0, cell, gene].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


@BOTH
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 40), (31, 33), (33, 31), (70, 64), (150, 290)])
def test_energy_equals_double_precision_with_any_mask(n, m, unbiased):
    """Sizes on both sides of a block of rows, masked cells anywhere, copies within and between the sets."""
    generator = torch.Generator().manual_seed(n)
    x, y = torch.rand(2, n, 30, generator=generator), torch.rand(2, m, 30, generator=generator)
    x[0, n // 2], y[0, m // 2], x[1, 0] = x[0, 0], y[0, -1], y[1, 0]
    mask, target_mask = (torch.rand(2, size, generator=generator) < 0.7 for size in (n, m))
    mask[:, 0] = target_mask[:, 0] = True
    value, *gradients = value_and_gradients(
        lambda x, y: energy_distance(x, y, mask, target_mask=target_mask, unbiased=unbiased), x, y
    )

    def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([in_double(x[i][mask[i]], y[i][target_mask[i]], unbiased) for i in range(2)])

    expected, *slopes = value_and_gradients(reference, x.double(), y.double())
    torch.testing.assert_close(value, expected.float(), atol=2e-6, rtol=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient, slope.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("n_genes", [3, 2000, 20_000])
def test_energy_is_zero_at_equality_and_so_is_its_gradient(n_genes):
    torch.manual_seed(0)
    real = torch.rand(2, 40, n_genes) + 3
    order = torch.randperm(40)
    value, gradient = value_and_gradients(lambda x: energy_distance(x, real, unbiased=False), real[:, order])
    size = torch.cdist(real, real).mean()
    assert value.abs().max() < 1e-6 * size
    assert gradient.norm(dim=-1).max() < 1e-5 / 40  # each of 40 cells could pull with 1/40
    unbiased = energy_distance(real[:, order], real)  # its inner means leave out 40 zeros that its outer mean holds
    inner = torch.cdist(real.double(), real.double()).sum((1, 2)) / (40 * 39)
    torch.testing.assert_close(unbiased, (-inner / 40).float(), atol=1e-6 * float(size), rtol=1e-4)


@BOTH
@pytest.mark.parametrize("n_genes", [5, 20_000])
def test_copies_of_one_cell_have_neither_distance_nor_gradient(n_genes, unbiased):
    torch.manual_seed(0)
    cell = torch.randn(1, 1, n_genes) * 10
    value, *gradients = value_and_gradients(
        lambda x, y: energy_distance(x, y, unbiased=unbiased), cell.repeat(1, 50, 1), cell.repeat(1, 34, 1)
    )
    assert value.item() == 0
    assert not any(gradient.any() for gradient in gradients)


@BOTH
def test_cells_a_hundredth_apart_are_no_copies(unbiased):
    torch.manual_seed(0)
    y = torch.randn(1, 10, 200)
    x = y + 0.01 * torch.randn(1, 10, 200)
    expected, slope = value_and_gradients(lambda x: in_double(x[0], y[0], unbiased), x.double())
    value, gradient = value_and_gradients(lambda x: energy_distance(x, y, unbiased=unbiased), x)
    torch.testing.assert_close(value[0], expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, slope.float(), atol=1e-5, rtol=0)


@BOTH
def test_energy_distance_is_a_distance(unbiased):
    """Symmetric, blind to the order of cells, unmoved by a common shift, and scaling with the data."""
    torch.manual_seed(0)
    x, y = torch.rand(3, 9, 20), torch.rand(3, 9, 20) + 0.2
    value = energy_distance(x, y, unbiased=unbiased)
    torch.testing.assert_close(energy_distance(y, x, unbiased=unbiased), value)
    torch.testing.assert_close(energy_distance(x + 5, y + 5, unbiased=unbiased), value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(energy_distance(3 * x, 3 * y, unbiased=unbiased), 3 * value, atol=1e-4, rtol=1e-4)
    assert (value > 0).all()


@pytest.mark.parametrize("name", ["energy", "sinkhorn", "energy+0.01*sinkhorn"])
def test_the_order_of_cells_does_not_matter_and_gradients_move_along(name):
    torch.manual_seed(0)
    x, y = torch.rand(2, 40, 12), torch.rand(2, 40, 12) + 0.1
    one, other = torch.randperm(40), torch.randperm(40)
    value, gradient = value_and_gradients(lambda x: set_loss(name)(x, y, None), x)
    moved, moved_gradient = value_and_gradients(lambda x: set_loss(name)(x, y[:, other], None), x[:, one])
    torch.testing.assert_close(moved, value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved_gradient, gradient[:, one], atol=1e-6, rtol=1e-3)


def test_a_large_common_offset_does_not_spoil_the_energy():
    """Without centring, float32 squares of 1e3 leave about 1 % of these distances."""
    torch.manual_seed(0)
    x, y = torch.rand(1, 20, 50) + 1000, torch.rand(1, 20, 50) + 1000.1
    value, gradient = value_and_gradients(lambda x: energy_distance(x, y), x)
    expected, slope = value_and_gradients(lambda x: in_double(x[0], y[0], True), x.double())
    torch.testing.assert_close(value[0], expected.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, slope.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(4, 32, 200), (2, 100, 2000)])
def test_biased_energy_is_geomloss(shape):
    torch.manual_seed(0)
    x, y = torch.rand(shape) * 1.2, torch.rand(shape)
    peer = SamplesLoss("energy", blur=0.05, backend="tensorized")
    value, gradient = value_and_gradients(lambda x: energy_distance(x, y, unbiased=False), x)
    theirs, slope = value_and_gradients(lambda x: peer(x, y), x)
    torch.testing.assert_close(value, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-3)
    exact, slope = value_and_gradients(lambda x: peer(x, y.double()), x.double())
    torch.testing.assert_close(value, exact.float(), atol=1e-5, rtol=2e-5)  # theirs holds 1e-4 on the diagonal
    torch.testing.assert_close(gradient, slope.float(), atol=1e-8, rtol=1e-4)


def test_biased_energy_with_masks_is_geomloss_with_weights():
    torch.manual_seed(0)
    x, y = torch.rand(3, 20, 60) * 1.2, torch.rand(3, 20, 60)
    mask = torch.arange(20)[None] < torch.tensor([[20], [7], [2]])
    weights = (mask / mask.sum(1, keepdim=True)).double()
    peer = SamplesLoss("energy", backend="tensorized")
    value, gradient = value_and_gradients(lambda x: energy_distance(x, y, mask, unbiased=False), x)
    theirs, slope = value_and_gradients(lambda x: peer(weights, x, weights, y.double()), x.double())
    torch.testing.assert_close(value, theirs.float(), atol=1e-4, rtol=0)  # they hold 1e-4 on the diagonal
    torch.testing.assert_close(gradient, slope.float(), atol=1e-6, rtol=1e-4)


def test_unbiased_energy_averages_to_zero_at_every_size():
    torch.manual_seed(0)
    for n_cells in (2, 5, 40):
        x, y = torch.randn(2, 4000 // n_cells, n_cells, 10)
        unbiased, biased = energy_distance(x, y), energy_distance(x, y, unbiased=False)
        assert abs(unbiased.mean()) < 3.5 * unbiased.std() / len(x) ** 0.5
        assert biased.mean() > 3 / n_cells


def test_minimising_the_unbiased_energy_keeps_the_spread():
    """With sets of 8, the V-statistic shrinks the predicted spread; the U-statistic does not."""
    torch.manual_seed(0)
    spread = {}
    for unbiased in (True, False):
        scale = torch.tensor(1.0, requires_grad=True)
        optimizer = torch.optim.Adam([scale], lr=0.02)
        for _ in range(150):
            loss = energy_distance(scale * torch.randn(64, 8, 10), torch.randn(64, 8, 10), unbiased=unbiased).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread[unbiased] = float(scale.detach())
    assert spread[True] == pytest.approx(1, abs=0.07)
    assert spread[False] == pytest.approx(0.79, abs=0.07)


@pytest.mark.parametrize("name", ["energy", "sinkhorn", "mse", "energy+0.01*sinkhorn"])
def test_every_loss_trains_with_single_cells_duplicates_and_padding(name):
    torch.manual_seed(0)
    predicted = torch.rand(3, 6, 10)
    predicted[0] = predicted[0, :1]
    target = predicted.clone()
    predicted.requires_grad_()
    mask = torch.arange(6)[None] < torch.tensor([[6], [1], [4]])
    loss = set_loss(name)(predicted, target, mask)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(predicted.grad).all()
    assert not predicted.grad[1, 1:].any()


@pytest.mark.parametrize(
    ("name", "n_chunks"),
    [("energy", 1), ("energy", 3), ("sinkhorn", 1), ("mse", 1), ("energy+0.01*sinkhorn", 1), ("se", 3)],
)
def test_a_masked_set_is_the_shorter_set(name, n_chunks):
    """Value and gradient, whatever the masked cells hold."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 9, 12), torch.rand(2, 9, 12)
    # geomloss chooses its steps from the spread of all points: let the other set not widen it
    x[0], y[0] = (torch.rand(9, 5).softmax(dim=1) @ each[1, :5] for each in (x, y))
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    loss = set_loss(name, n_chunks=n_chunks)
    short, slope = value_and_gradients(lambda x: loss(x, y[1:, :5], None), x[1:, :5])
    for offset in (0, 50):
        x[1, 5:] += offset
        y[1, 5:] -= offset
        value, gradient = value_and_gradients(lambda x: loss(x, y, mask), x)
        torch.testing.assert_close(value[1:], short, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient[1:, :5], slope, atol=1e-5, rtol=1e-4)
        assert not gradient[1, 5:].any()


def test_bfloat16_prediction_is_scored_in_float32():
    """Also where the backward pass runs inside autocast."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 16, 50).bfloat16(), torch.rand(2, 16, 50)
    rounded = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = energy_distance(rounded, y)
        loss.sum().backward()
    value, gradient = value_and_gradients(lambda x: energy_distance(x, y), x.float())
    assert loss.dtype == torch.float32 and rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach(), value, atol=0, rtol=0)
    torch.testing.assert_close(rounded.grad, gradient.bfloat16(), atol=0, rtol=0)


def test_only_the_gradient_that_is_asked_for():
    torch.manual_seed(0)
    x, y = torch.rand(2, 5, 8), torch.rand(2, 7, 8)
    masks = {"mask": torch.ones(2, 5), "target_mask": torch.ones(2, 7)}
    both = value_and_gradients(lambda x, y: energy_distance(x, y, **masks), x, y)
    torch.testing.assert_close(value_and_gradients(lambda x: energy_distance(x, y, **masks), x)[1], both[1])
    torch.testing.assert_close(value_and_gradients(lambda y: energy_distance(x, y, **masks), y)[1], both[2])
    assert not energy_distance(x, y, **masks).requires_grad
    value = energy_distance(x.requires_grad_(), y, **masks).square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_loss_that_is_no_number_stays_none():
    x, y = torch.rand(2, 40, 8), torch.rand(2, 40, 8)
    x[0, 35, 3] = float("nan")
    value = energy_distance(x, y)
    assert value[0].isnan() and value[1].isfinite()
    assert energy_distance(x, y, torch.zeros(2, 40, dtype=torch.bool)).isnan().all()


def test_sinkhorn_is_geomloss():
    torch.manual_seed(0)
    x, y = torch.rand(2, 20, 30), torch.rand(2, 20, 30) + 0.1
    peer = SamplesLoss("sinkhorn", p=2, blur=0.4, backend="tensorized")
    found, theirs = (
        value_and_gradients(loss, x) for loss in (lambda x: sinkhorn(x, y, blur=0.4), lambda x: peer(x, y))
    )
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


def test_mse_is_the_mean_over_real_cells_and_genes():
    x, y = torch.rand(2, 4, 3), torch.rand(2, 4, 3)
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    expected = [(x[i][mask[i]] - y[i][mask[i]]).square().mean() for i in range(2)]
    torch.testing.assert_close(mse(x, y, mask), torch.stack(expected))


def test_automatic_blur_follows_the_scale_of_the_data():
    torch.manual_seed(0)
    x, y = torch.rand(2, 6, 10), torch.rand(2, 6, 10)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    distances = torch.cat([torch.pdist(y[0]), torch.pdist(y[1, :4])])
    assert auto_blur(y, mask) == pytest.approx(0.1 * distances.median().item(), rel=1e-4)
    value, larger = (sinkhorn(scale * x, scale * y, mask, blur="auto") for scale in (1, 10))
    torch.testing.assert_close(larger, 100 * value, atol=0, rtol=1e-3)
    assert auto_blur(y[:, :1], mask[:, :1]) == 0.05


def test_a_sum_is_the_weighted_sum_of_its_terms():
    torch.manual_seed(0)
    x, y = torch.rand(2, 6, 10), torch.rand(2, 6, 10)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    expected = 2 * energy_distance(x, y, mask, unbiased=False) + 0.5 * sinkhorn(x, y, mask, blur=0.3) + mse(x, y, mask)
    loss = set_loss("2*energy + 0.5*sinkhorn + mse", unbiased=False, blur=0.3)
    torch.testing.assert_close(loss(x, y, mask), expected)
    torch.testing.assert_close(set_loss("se")(x, y, mask), set_loss("energy+0.01*sinkhorn")(x, y, mask))


def test_chunks_average_the_loss_over_the_groups_of_genes_that_state_forms():
    """arc-state 0.11.1 cuts 10 genes into 4, 4 and 2 for `mmd_num_chunks=3` and averages the three losses."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 6, 10), torch.rand(2, 6, 10)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    parts = [energy_distance(x[..., genes], y[..., genes], mask) for genes in (slice(4), slice(4, 8), slice(8, 10))]
    loss = set_loss("energy", n_chunks=3)
    value, gradient = value_and_gradients(lambda x: loss(x, y, mask), x)
    torch.testing.assert_close(value, sum(parts) / 3)
    assert gradient[mask].ne(0).all()
    with pytest.raises(InputError, match="mmd_num_chunks.* is 11, but there are 10 genes"):
        set_loss("energy", n_chunks=11)(x, y, mask)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("energy", {"blur": 0.1}, "blur=0.1"),
        ("energy+mse", {"blur": "auto"}, "blur=auto"),
        ("sinkhorn+mse", {"unbiased": False}, "unbiased=False"),
        ("mse", {"n_chunks": 2}, "mmd_num_chunks=2"),
    ],
)
def test_an_option_that_no_term_reads_is_refused(name, options, named):
    with pytest.raises(InputError, match=rf"model\.kwargs\.{named}' has no effect on the loss"):
        set_loss(name, **options)
    set_loss("energy+sinkhorn", **options)
