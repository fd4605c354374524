"""Samplers against known distributions and brute force, and the five defects that they must not have."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.stats import chisquare, kstest

from esm_perturb.core.config import InputError
from esm_perturb.proteins.denoiser import Denoiser
from esm_perturb.proteins.diffusion_model import DiffusionModel, length_prior
from esm_perturb.proteins.exact_denoiser import ExactDenoiser
from esm_perturb.proteins.forward_process import MASK, PAD
from esm_perturb.proteins.noise import NOISE_SCHEDULES, noise_schedule
from esm_perturb.proteins.rank_streams import count_streams, rank_generator
from esm_perturb.proteins.reverse_steps import PREDICTORS, change_bound, jump_probabilities, unmask_probability
from esm_perturb.proteins.sampling import draw_lengths, draw_unique, sample
from esm_perturb.proteins.sequences import AMINO_ACIDS

STEPPED = PREDICTORS[:3]
PROTEINS = {"MKV": 0.4, "MAV": 0.25, "GGC": 0.2, "GKC": 0.1, "WWW": 0.05}
SINGLE = {"A": 0.4, "C": 0.3, "D": 0.2, "E": 0.1}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(process="absorbing", **options) -> DiffusionModel:
    """A small untrained model whose answers depend on the tokens and the time."""
    torch.manual_seed(0)
    net = Denoiser(hidden_dim=16, n_layers=1, n_heads=2, dropout=0.3, time_conditioning=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = {"process": process, "parameterization": "subs" if process == "absorbing" else "score"}
    settings |= {"noise": noise_schedule("loglinear"), "length_prior": length_prior([8, 12, 20]), "max_length": 24}
    return DiffusionModel(net, **settings | options)


def p_value(sequences: list[str], wanted: dict[str, float]) -> float:
    """Chi-squared against known probabilities; 0 when something impossible was drawn."""
    counts = [sequences.count(sequence) for sequence in wanted]
    if sum(counts) < len(sequences):
        return 0.0
    return chisquare(counts, np.array(list(wanted.values())) * len(sequences)).pvalue


# ---- steps ----


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_analytic_equals_ancestral(name):
    noise = noise_schedule(name)
    p = torch.rand(2, 5, 20, dtype=torch.float64, generator=rank_generator(0, 0, 0))
    p /= p.sum(-1, keepdim=True)
    tokens = torch.randint(0, 20, (2, 5), generator=rank_generator(0, 0, 1))
    for t, s in ((1.0, 0.99), (0.7, 0.2), (0.3, 0.299), (0.05, 1e-5)):
        masks = [unmask_probability(noise, t, s, predictor) for predictor in ("analytic", "ancestral")]
        assert masks[0] == pytest.approx(masks[1], rel=1e-9)
        jumps = [jump_probabilities(noise, t, s, predictor, tokens, p) for predictor in ("analytic", "ancestral")]
        torch.testing.assert_close(*jumps, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_exact_steps_equal_bayes_rule_with_rate_matrices(name, process):
    """The whole chain by matrix exponentials: p(x_s = y | x_t) = sum over x0 of p(x0 | x_t) q(x_s = y | x_t, x0)."""
    noise, t, s = noise_schedule(name), 0.8, 0.35
    n = 21 if process == "absorbing" else 20
    rates = np.full((n, n), 1 / 20) if process == "uniform" else np.zeros((n, n))
    rates[:, -1] += 1.0 if process == "absorbing" else 0.0
    rates -= np.diag(rates.sum(axis=1))
    sigma_t, sigma_s = (float(noise.sigma(torch.tensor(x, dtype=torch.float64))) for x in (t, s))
    to_s, onward, to_t = expm(sigma_s * rates), expm((sigma_t - sigma_s) * rates), expm(sigma_t * rates)
    x = 20 if process == "absorbing" else 4
    p = np.random.default_rng(0).dirichlet(np.ones(20))
    expected = sum(p[x0] * to_s[x0] * onward[:, x] / to_t[x0, x] for x0 in range(20))
    assert expected.sum() == pytest.approx(1)
    for predictor in ("analytic", "ancestral"):
        if process == "absorbing":
            found = unmask_probability(noise, t, s, predictor) * p
        else:
            found = jump_probabilities(noise, t, s, predictor, torch.tensor([[x]]), torch.tensor(p)[None, None])[0, 0]
            expected[x] = 0
        np.testing.assert_allclose(found, expected[:20], rtol=1e-6)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_euler_converges_with_the_first_order(name):
    """Halving the step halves the difference to the exact probability of lifting a mask over a whole interval."""
    noise = noise_schedule(name)

    def lifted(predictor, steps):
        times = np.linspace(0.9, 0.2, steps + 1)
        kept = [1 - unmask_probability(noise, t, s, predictor) for t, s in zip(times, times[1:], strict=False)]
        return 1 - math.prod(kept)

    exact = unmask_probability(noise, 0.9, 0.2, "ancestral")
    assert lifted("ancestral", 50) == pytest.approx(exact, rel=1e-9)
    errors = [abs(lifted("euler", steps) - exact) for steps in (200, 400, 800)]
    assert errors[2] < 0.01 * exact
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine < 1e-12 or 1.7 < coarse / fine < 2.3


@pytest.mark.parametrize("predictor", STEPPED)
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_no_answer_of_a_network_exceeds_the_bound(name, predictor):
    noise, generator = noise_schedule(name), rank_generator(1, 0, 0)
    tokens = torch.randint(0, 20, (200, 3), generator=generator)
    p = torch.rand(200, 3, 20, dtype=torch.float64, generator=generator) ** 20  # some flat, some nearly certain
    p /= p.sum(-1, keepdim=True)
    for t, s in ((1.0, 0.9), (0.5, 0.49), (0.1, 1e-5)):
        bound = change_bound("uniform", noise, t, s, predictor)
        assert jump_probabilities(noise, t, s, predictor, tokens, p).sum(-1).max() <= bound + 1e-12


# ---- distributions ----


@pytest.mark.parametrize("predictor", STEPPED)
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_marginals_of_a_known_distribution(process, predictor):
    """One residue alone: every number of steps is exact for the exact steps, many steps for Euler."""
    oracle = ExactDenoiser(SINGLE, process=process, noise=noise_schedule("cosine"))
    steps = 200 if predictor == "euler" else 10
    drawn = sample(oracle, 4000, predictor=predictor, steps=steps, generator=rank_generator(2, 0, 0), batch_size=4000)
    assert p_value(drawn.sequences, SINGLE) > 1e-3


@pytest.mark.parametrize("process, predictor", [("absorbing", "ancestral"), ("uniform", "analytic")])
def test_joint_distribution_with_many_steps(process, predictor):
    """Places depend on each other; steps so small that two of them seldom change at once give the joint."""
    oracle = ExactDenoiser(PROTEINS, process=process, noise=noise_schedule("loglinear"))
    drawn = sample(
        oracle, 2000, predictor=predictor, steps=2000, generator=rank_generator(3, 0, 0), batch_size=2000
    ).sequences
    known = [sequence for sequence in drawn if sequence in PROTEINS]
    assert len(known) >= 0.99 * len(drawn)
    assert p_value(known, PROTEINS) > 1e-3


def test_first_hitting_is_exact_with_a_call_a_residue():
    oracle = ExactDenoiser(PROTEINS, noise=noise_schedule("cosine"))
    drawn = sample(oracle, 4000, predictor="first_hitting", generator=rank_generator(4, 0, 0), batch_size=4000)
    assert p_value(drawn.sequences, PROTEINS) > 1e-3
    assert drawn.n_network_calls == 3


def test_first_hitting_asks_at_the_time_of_each_change_and_lifts_any_mask():
    """With k masks left at time t, the next is lifted at s with chance 1 - ((1 - alpha(s)) / (1 - alpha(t)))^k."""
    asked, lifted = [], []

    class Witness:
        process, max_length, device, noise = "absorbing", 4, torch.device("cpu"), noise_schedule("cosine")

        def denoise(self, tokens, lengths, t):
            asked.append((t.double(), (tokens == MASK).sum(1)))
            lifted.append((tokens != MASK).float().mean(0))
            return torch.full((*tokens.shape, 20), math.log(0.05))

    options = {"lengths": [4] * 3000, "generator": rank_generator(8, 0, 0), "batch_size": 3000}
    sample(Witness(), 3000, predictor="first_hitting", **options)
    before = 1 - Witness.noise.alpha(torch.ones(3000, dtype=torch.float64))
    for number, (t, masks) in enumerate(asked):
        assert (masks == 4 - number).all()
        share = 1 - Witness.noise.alpha(t)
        assert kstest((share / before) ** (4 - number), "uniform").pvalue > 1e-3
        before = share
    assert len(asked) == 4 and (lifted[1] - 0.25).abs().max() < 0.04


def test_temperature():
    """1 leaves the distribution alone; one half squares its probabilities."""
    squared = {key: value**2 / sum(v**2 for v in SINGLE.values()) for key, value in SINGLE.items()}
    for temperature, wanted in ((1.0, SINGLE), (0.5, squared)):
        drawn = sample(ExactDenoiser(SINGLE), 4000, steps=5, temperature=temperature, generator=rank_generator(5, 0, 0))
        assert p_value(drawn.sequences, wanted) > 1e-3


def test_draws_are_made_in_float64():
    """A residue of probability 1e-9 is beyond float32's uniform numbers; u decides on it in float64."""
    from esm_perturb.proteins.sampling import _choose

    shares = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64)
    assert _choose(shares, torch.tensor(1 - 5e-10, dtype=torch.float64)) == 1
    assert torch.tensor(1 - 5e-10, dtype=torch.float32) == 1  # float32 cannot even hold this number
    with pytest.raises(TypeError, match="float64"):
        _choose(shares.float(), torch.tensor(0.5))
    with pytest.raises(TypeError, match="float64"):
        _choose(shares, torch.tensor(0.5))


# ---- sampling ----


@pytest.mark.parametrize(
    "process, predictor", [("absorbing", p) for p in PREDICTORS] + [("uniform", p) for p in STEPPED]
)
@pytest.mark.parametrize("steps", [1, 7])
def test_everything_is_resolved(process, predictor, steps):
    model = network(process)
    drawn = sample(model, 9, predictor=predictor, steps=steps, generator=rank_generator(6, 0, 0), batch_size=4)
    inside = torch.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    assert ((drawn.tokens >= 0) & (drawn.tokens < 20))[inside].all() and (drawn.tokens[~inside] == PAD).all()
    assert [len(sequence) for sequence in drawn.sequences] == drawn.lengths.tolist()
    assert set(drawn.lengths.tolist()) <= {8, 12, 20} and set("".join(drawn.sequences)) <= set(AMINO_ACIDS)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_skipping_changes_nothing(process, monkeypatch):
    """The same proteins when every sequence passes through the network at every step."""
    import esm_perturb.proteins.sampling as module

    model, options = network(process), {"steps": 60, "predictor": "analytic", "lengths": [6] * 5}
    skipped = sample(model, 5, generator=rank_generator(7, 0, 0), **options)
    assert skipped.n_network_rows < 5 * 61
    original = module._Sampler.posterior

    def ask_all(self, rows, t):
        everyone = torch.arange(len(self.tokens))
        for part, p in original(self, everyone, t.new_full((len(everyone),), float(t[0]) if len(t) else 0.5)):
            if len(rows):
                yield part[torch.isin(part, rows)], p[torch.isin(part, rows)]

    monkeypatch.setattr(module._Sampler, "posterior", ask_all)
    asked = sample(model, 5, generator=rank_generator(7, 0, 0), **options)
    assert asked.n_network_rows == 5 * 61 and asked.sequences == skipped.sequences


def test_batch_size_changes_nothing():
    model = network()
    together, alone = (
        sample(model, 7, steps=20, generator=rank_generator(8, 0, 0), batch_size=size).sequences for size in (64, 1)
    )
    assert together == alone


@pytest.mark.parametrize("process, predictor", [("absorbing", p) for p in PREDICTORS] + [("uniform", "euler")])
def test_infilling_keeps_what_is_fixed(process, predictor):
    seen = []
    drawn = sample(
        network(process), 6, steps=12, predictor=predictor, fixed={0: "MKV", 4: "w", -2: "GG"},
        generator=rank_generator(9, 0, 0), on_step=lambda step, t, tokens: seen.append(tokens[:, :3].clone()),
    )  # fmt: skip
    assert all(s.startswith("MKV") and s[4] == "W" and s.endswith("GG") for s in drawn.sequences)
    assert all((tokens == torch.tensor([10, 8, 17])).all() for tokens in seen)
    template = sample(
        network(process), 3, steps=5, fixed="M___HH", predictor=predictor, generator=rank_generator(9, 0, 1)
    )
    assert all(len(s) == 6 and s[0] == "M" and s[4:] == "HH" for s in template.sequences)


def test_infilling_conditions_on_what_is_fixed():
    wanted = {"MKV": 0.4 / 0.65, "MAV": 0.25 / 0.65}
    drawn = sample(
        ExactDenoiser(PROTEINS), 3000, fixed="M__", steps=400, predictor="analytic", generator=rank_generator(10, 0, 0),
        batch_size=3000,
    ).sequences  # fmt: skip
    known = [sequence for sequence in drawn if sequence in wanted]
    assert len(known) > 0.99 * len(drawn) and p_value(known, wanted) > 1e-3


def test_lengths_follow_the_prior():
    oracle = ExactDenoiser({"MK": 1, "MKVA": 2, "GGGGGGG": 1})
    lengths = draw_lengths(oracle.length_prior, 3000, generator=rank_generator(11, 0, 0), longest=5)
    assert chisquare([(lengths == 2).sum(), (lengths == 4).sum()], [1000, 2000]).pvalue > 1e-3
    with pytest.raises(InputError, match="has 8 to any number of residues"):
        draw_lengths(oracle.length_prior, 1, generator=rank_generator(0, 0, 0), shortest=8)
    with pytest.raises(InputError, match="the model knows 1 to 7"):
        sample(oracle, 1, lengths=[9], generator=rank_generator(0, 0, 0))


def test_random_state_train_mode_and_gradients_stay():
    model = network()
    model.network.train()
    next(model.network.children()).eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = sample(model, 4, steps=8, generator=rank_generator(12, 0, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model.eval()
    assert sample(model, 4, steps=8, generator=rank_generator(12, 0, 0)).sequences == drawn.sequences  # no dropout


def test_a_diverged_model_is_refused():
    model = network()
    torch.nn.init.constant_(next(iter(model.network.parameters())), math.nan)
    with pytest.raises(InputError, match="diverged"):
        sample(model, 2, steps=3, generator=rank_generator(0, 0, 0))
    with pytest.raises(InputError, match="absorbing"):
        sample(network("uniform"), 2, predictor="first_hitting", generator=rank_generator(0, 0, 0))


def test_draw_unique_redraws_in_place_and_flags():
    pool = iter(["A", "B", "A", "B", "C", "A", "A", "A", "A"])
    sequences, repeated = draw_unique(lambda places: [next(pool) for _ in places], 4, taken=["B"], attempts=2)
    assert sequences == ["A", "C", "A", "A"] and repeated == [False, False, True, True]


# ---- the original's five defects ----


def test_defect_1_streams_of_ranks_do_not_collide():
    steps = range(100, 10_100, 100)
    assert count_streams(64, steps) == 6400
    assert count_streams(64, steps, scheme="linear") < 0.25 * 6400  # what the documented formula does
    torch.testing.assert_close(
        torch.rand(9, generator=rank_generator(42, 100, 0, "linear")),
        torch.rand(9, generator=rank_generator(42, 0, 10, "linear")),
    )


@pytest.mark.parametrize("predictor", STEPPED)
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_defect_2_probabilities_are_turned_into_scores(name, predictor):
    """Almost nothing is left for the last denoising, and not everything comes in the first step: at every time as many
    residues are masked as the forward process masks. Probabilities in the place of scores leave 22% to the last step
    (cosine), or lift all masks in the first (log-linear)."""
    noise, masked = noise_schedule(name), {}
    oracle = ExactDenoiser(["ACDEFGHIKL" * 4], noise=noise)

    def count(step, t, tokens):
        masked[step] = (t, float((tokens == MASK).double().mean()))

    sample(
        oracle, 100, steps=100, predictor=predictor, generator=rank_generator(13, 0, 0), on_step=count, batch_size=100
    )
    assert masked[100][1] < 0.005 and masked[101][1] == 0
    for step in (1, 25, 50, 75):
        t, share = masked[step]
        expected = 1 - float(noise.alpha(torch.tensor(t, dtype=torch.float64)))
        assert share == pytest.approx(expected, abs=0.06 if predictor == "euler" else 0.03)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_defect_3_the_prior_is_where_training_ends(name):
    """Sampling starts from masks alone; training reaches 99.8% of them; a total noise of 1.5 gives 77.7%."""
    assert 1 - float(noise_schedule(name).alpha(torch.tensor(1.0, dtype=torch.float64))) > 0.998
    assert 1 - math.exp(-1.5) < 0.78


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_defect_4_the_rate_is_taken_at_the_time(name):
    """rate(t) is the slope of sigma at t (and not at some sigma)."""
    noise = noise_schedule(name)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (noise.sigma(t + 1e-6) - noise.sigma(t - 1e-6)) / 2e-6
    torch.testing.assert_close(noise.rate(t), slope, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(noise.sigma(t), -noise.alpha(t).log())


def test_defect_5_sampling_leaves_training_alone():
    """Three steps with dropout: the same weights whether proteins are sampled between them or not."""

    def trained(with_samples):
        model = network()
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            tokens = torch.full((4, 8), MASK)
            logits = model.network(tokens, torch.full((4,), 8), torch.full((4,), 0.5))
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(32, dtype=torch.long)).backward()
            if with_samples:
                sample(model, 2, steps=4, generator=rank_generator(5, step, 0))
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    one, two = trained(False), trained(True)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_streams_need_more_than_a_32_bit_seed():
    """PyTorch keeps 32 bits of a CPU seed; the whole state comes from (seed, step, rank)."""
    words = [
        rank_generator(1, 2, 3).get_state()[24 : 24 + 624 * 8],
        rank_generator(1, 3, 2).get_state()[24 : 24 + 624 * 8],
    ]
    assert (words[0] != words[1]).double().mean() > 0.4
    assert rank_generator(2**40 + 1, 0, 0).get_state().tolist() != rank_generator(1, 0, 0).get_state().tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_what_the_cpu_draws():
    model = network()
    one = sample(model, 4, steps=20, generator=rank_generator(14, 0, 0)).sequences
    two = sample(model.cuda(), 4, steps=20, generator=rank_generator(14, 0, 0)).sequences
    same = np.mean([a == b for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)])
    assert same > 0.9  # rounding may decide otherwise about a residue, and what follows from it
