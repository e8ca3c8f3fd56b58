"""The sparse layer's kernels against float64: which experts, in what order, and what they add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.kernels.device.testing import nothing_waits
from diptych.kernels.ops.moe import cuda, launch, reference
from diptych.kernels.ops.moe.experts import Experts, MoeWorkspace

# tokens, experts, top_k, hidden, intermediate: one token, the last step without sorting, the first with it, odd numbers
# of experts, sizes that fill no tile, more pairs than a chunk of the sorting.
SHAPES = (
    (1, 4, 2, 32, 48),
    (5, 8, 3, 48, 32),
    (16, 8, 2, 64, 32),
    (17, 8, 2, 80, 112),
    (40, 5, 5, 32, 16),
    (70, 3, 1, 16, 32),
    pytest.param((130, 17, 8, 32, 16), marks=pytest.mark.slow),
)


def make(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, place: torch.device, *, renormalise: bool = True
) -> tuple[Tensor, Experts]:
    tokens, num, top_k, hidden, inner = shape
    generator = torch.Generator(device=place).manual_seed(sum(shape))

    def normal(*sizes: int, scale: float) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=place).normal_(0.0, scale, generator=generator)

    experts = Experts(
        normal(num, hidden, scale=hidden**-0.5),
        normal(num, 2 * inner, hidden, scale=hidden**-0.5),
        normal(num, hidden, inner, scale=inner**-0.5),
        top_k,
        renormalise,
    )
    return normal(tokens, hidden, scale=1.0), experts


def poisoned(experts: Experts, tokens: int, *, invariant: bool = False) -> MoeWorkspace:
    """What is not written shows; what must be zero is."""
    workspace = MoeWorkspace(experts, max_tokens=tokens, invariant=invariant)
    for tensor in (workspace.partial, workspace.weights_P, workspace.inner_PI, workspace.out_PH):
        tensor.fill_(float("nan"))
    for numbers in (workspace.ids_P, workspace.pairs, workspace.expert_of, workspace.num_blocks):
        numbers.fill_(-7)
    return workspace


def exact(x: Tensor, experts: Experts, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Of the given choice: the weights, and the parts [K, T, H], in float64."""
    probabilities = torch.softmax(x.double() @ experts.router_EH.double().t(), dim=-1)
    weights = probabilities.gather(1, ids_TK)
    if experts.renormalise:
        weights = weights / weights.sum(1, keepdim=True)
    parts = torch.empty(experts.top_k, *x.shape, dtype=torch.float64, device=x.device)
    for expert in range(experts.num_experts):
        tokens, ranks = torch.nonzero(ids_TK == expert, as_tuple=True)
        gate, up = (x[tokens].double() @ experts.gate_up_EIH[expert].double().t()).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ experts.down_EHI[expert].double().t()
        parts[ranks, tokens] = out * weights[tokens, ranks, None]
    return weights, parts


def check(x: Tensor, experts: Experts, workspace: MoeWorkspace, tolerance: float) -> None:
    tokens = x.shape[0]
    found = cuda.moe(x, experts, workspace)
    assert found.count == experts.top_k
    ids = workspace.ids_P[: tokens * experts.top_k].view(tokens, -1).long()
    probabilities = torch.softmax(x.double() @ experts.router_EH.double().t(), dim=-1)
    chosen = probabilities.gather(1, ids)
    left = probabilities.scatter(1, ids, -1.0)
    assert (ids.sort(1).values.diff(dim=1) > 0).all(), "an expert twice"
    assert (chosen.min(1).values >= left.max(1).values - 1e-6).all(), "a better expert was left out"
    assert (chosen.diff(dim=1) <= 1e-6).all(), "not in falling order"
    weights, parts = exact(x, experts, ids)
    mine = workspace.weights_P[: tokens * experts.top_k].view(tokens, -1).double()
    torch.testing.assert_close(mine, weights, atol=1e-5, rtol=1e-4)
    error = (found.data.double() - parts).norm(dim=-1) / parts.norm(dim=-1).clamp_min(1e-6)
    assert error.max() < tolerance, f"relative error {error.max():.2e}"
    for zero in (workspace.counts_E, workspace.arrived, workspace.aligned):
        assert not zero.any(), "the next call would count from here"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_gives_the_parts_of_float64(shape: tuple[int, int, int, int, int], place: torch.device) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 1e-2)):
        x, experts = make(shape, dtype, place)
        check(x, experts, poisoned(experts, shape[0]), tolerance)


def test_the_definition_gives_them_too(place: torch.device) -> None:
    for shape in ((1, 4, 2, 32, 48), (5, 8, 3, 48, 32), (40, 5, 5, 32, 16)):
        x, experts = make(shape, torch.float32, place, renormalise=False)
        ids, weights = reference.route(x, experts)
        wanted_weights, wanted = exact(x, experts, ids)
        torch.testing.assert_close(weights.double(), wanted_weights, atol=1e-5, rtol=1e-4)
        parts = reference.moe(x, experts, MoeWorkspace(experts, max_tokens=shape[0]))
        torch.testing.assert_close(parts.data.double(), wanted, atol=1e-4, rtol=1e-3)


def test_a_workspace_serves_steps_of_all_sizes_one_after_another(place: torch.device) -> None:
    """Nothing of a step may reach the next: sorted, unsorted, larger, smaller."""
    _, experts = make((1, 8, 2, 32, 32), torch.float32, place)
    workspace = poisoned(experts, 40)
    for tokens in (40, 3, 17, 16, 1, 40):
        x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(place)
        check(x, experts, workspace, 1e-4)


@pytest.mark.parametrize(
    "tokens", [16, 32, pytest.param(33, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]
)
def test_all_tokens_may_want_the_same_experts(tokens: int, place: torch.device) -> None:
    """Blocks that are exactly full, and experts without a token."""
    x, experts = make((tokens, 8, 2, 32, 16), torch.float32, place)
    same = x[:1].expand(tokens, -1) + 1e-3 * x
    check(same.contiguous(), experts, poisoned(experts, tokens), 1e-4)


def test_weights_stay_parts_of_all_experts_where_the_model_does_not_renormalise(place: torch.device) -> None:
    for tokens in (7, 20):
        x, experts = make((tokens, 8, 2, 32, 16), torch.float32, place, renormalise=False)
        workspace = poisoned(experts, tokens)
        check(x, experts, workspace, 1e-4)
        assert (workspace.weights_P.view(tokens, 2).sum(1) < 0.999).all()


def test_of_equal_experts_the_lowest_ids_are_taken(place: torch.device) -> None:
    x, experts = make((20, 8, 3, 32, 16), torch.float32, place)
    experts.router_EH.zero_()
    workspace = poisoned(experts, 20)
    cuda.moe(x, experts, workspace)
    assert workspace.ids_P.view(20, 3).tolist() == [[0, 1, 2]] * 20
    assert reference.route(x, experts)[0].tolist() == [[0, 1, 2]] * 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tokens", [4, 30])
def test_a_token_that_is_not_finite_harms_itself_alone(tokens: int, place: torch.device) -> None:
    """Its experts may be any, but they must exist: a wild id reads and writes where it should not."""
    x, experts = make((tokens, 8, 2, 32, 16), torch.float32, place)
    clean = cuda.moe(x, experts, poisoned(experts, tokens)).data.clone()
    x[2] = float("nan")
    workspace = poisoned(experts, tokens)
    parts = cuda.moe(x, experts, workspace)
    assert ((workspace.ids_P >= 0) & (workspace.ids_P < 8)).all()
    others = [token for token in range(tokens) if token != 2]
    torch.testing.assert_close(parts.data[:, others].sum(0), clean[:, others].sum(0))
    assert parts.total()[2].isnan().all()
    check(torch.nan_to_num(x), experts, workspace, 1e-4)


def test_bits_of_a_token_do_not_depend_on_its_company_where_that_is_asked(place: torch.device) -> None:
    x, experts = make((70, 8, 2, 64, 32), torch.float32, place)
    together = cuda.moe(x, experts, poisoned(experts, 70, invariant=True)).data.clone()
    for span in (slice(5, 6), slice(3, 20), slice(40, 70)):
        alone = cuda.moe(x[span].contiguous(), experts, poisoned(experts, 70, invariant=True))
        assert torch.equal(alone.data, together[:, span])


def test_a_call_that_failed_half_way_leaves_nothing_to_the_next(
    place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router had counted already when the sorting could not be launched."""
    x, experts = make((20, 8, 2, 32, 16), torch.float32, place)
    workspace = poisoned(experts, 20)

    def fail(*_: object) -> None:
        raise RuntimeError("a wish")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "sort_pairs", fail)
        with pytest.raises(RuntimeError, match="a wish"):
            cuda.moe(x, experts, workspace)
    check(x, experts, workspace, 1e-4)


def test_what_does_not_fit_is_refused(place: torch.device) -> None:
    x, experts = make((5, 8, 2, 32, 16), torch.float32, place)
    workspace = MoeWorkspace(experts, max_tokens=4)
    with pytest.raises(ValueError, match="5 tokens, the workspace is for 1 to 4"):
        launch.moe(x, experts, workspace)
    with pytest.raises(ValueError, match="0 tokens"):
        launch.moe(x[:0], experts, workspace)
    with pytest.raises(ValueError, match=r"tokens \(4, 16\)"):
        launch.moe(x[:4, :16].contiguous(), experts, workspace)
    with pytest.raises(ValueError, match="float16"):
        launch.moe(x[:4].half(), experts, workspace)
    with pytest.raises(ValueError, match="9 a token"):
        Experts(experts.router_EH, experts.gate_up_EIH, experts.down_EHI, 9, True)
    assert launch.refusal(128, 2048, 768) is None
    assert "not for 8 of 40 x 64" in (launch.refusal(8, 40, 64) or "")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(tokens, 128, 8, 2048, 768) for tokens in (1, 2, 8, 16, 17, 64, 128, 256, 512, 1024, 4096, 8192)]
    + [(tokens, 8, 2, 4096, 14336) for tokens in (1, 16, 64, 512, 2048)]
    + [(300, 64, 6, 1024, 1408), (33, 512, 10, 512, 256), (700, 3, 2, 144, 208)],
    ids=str,
)
def test_bfloat16_on_a_card(shape: tuple[int, int, int, int, int], place: torch.device) -> None:
    x, experts = make(shape, torch.bfloat16, place)
    check(x, experts, poisoned(experts, shape[0]), 1.5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 64, 100, 250, 600, 2000, 5000])
def test_float32_on_a_card(tokens: int, place: torch.device) -> None:
    """Tiles that fit a multiprocessor in 16 bits need not in 32."""
    x, experts = make((tokens, 8, 2, 1024, 512), torch.float32, place)
    check(x, experts, poisoned(experts, tokens), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 600])
def test_a_graph_holds_it_and_nothing_asks_the_device(tokens: int, place: torch.device) -> None:
    x, experts = make((tokens, 32, 4, 256, 128), torch.bfloat16, place)
    workspace = poisoned(experts, tokens)
    cuda.moe(x, experts, workspace)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), nothing_waits():
        graph.capture_begin(capture_error_mode="thread_local")
        parts = cuda.moe(x, experts, workspace)
        graph.capture_end()
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        ids = workspace.ids_P.view(tokens, -1).long()
        wanted = exact(x, experts, ids)[1]
        assert ((parts.data.double() - wanted).norm() / wanted.norm()) < 1e-2
