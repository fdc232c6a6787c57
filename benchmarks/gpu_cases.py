"""What is measured on a GPU: inputs, contenders, and the float64 answer that each must come close to.

Errors are taken on a sample of documents or queries, whose exact answers fit in memory; PyTorch's errors in the same dtype
stand beside them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_clock import FEWEST_ROUNDS, Contender
from edgecolbert_kernels import PackedEmbeddings, contrastive_loss, distillation_loss, maxsim, maxsim_varlen
from edgecolbert_kernels.device import embeddings as resident

HALF = torch.float16
SAMPLE = 32
EXACT_SIMILARITIES = 1 << 27  # that the reference holds at a time
# Inputs that rotate: more bytes than a last-level cache holds.
ROTATED_BYTES = 200 << 20
MOST_COPIES = 8
# Eager PyTorch holds every similarity, some of them several times.
EAGER_BYTES = 30e9
# A batch that takes seconds.
LARGEST = 10_000


@dataclass
class Case:
    """`operations` are those of the similarities, 2 a multiply-add; `bytes` what must be read; 0 where a rate says nothing."""

    name: str
    parameters: dict[str, Any]
    contenders: list[Contender]
    error: Callable[[Any], float]
    operations: float = 0.0
    bytes: float = 0.0
    rounds: int = 60
    fewest: int = FEWEST_ROUNDS
    memory: bool = False
    tolerance: float = 0.05
    copy: Contender | None = None  # of `bytes` bytes, half of them read, half written
    references: Sequence[str] = field(default_factory=lambda: ["fused"])


class Inputs:
    """Unit rows on a device, the documents at several addresses, with ragged lengths on request."""

    def __init__(self, shape: tuple[int, ...], length: int, dim: int, device: torch.device, ragged: bool = False):
        *queries, query_length = shape[:-1]
        count = shape[-1]
        generator = torch.Generator(device.type).manual_seed(1)

        def unit(*size: int) -> Tensor:
            rows = torch.randn(*size, dim, generator=generator, device=device)
            return torch.nn.functional.normalize(rows, dim=-1).to(HALF)

        self.device, self.length, self.dim = device, length, dim
        self.Q = unit(*queries, query_length)
        first = unit(count, length)
        copies = min(MOST_COPIES, 1 + ROTATED_BYTES // max(1, first.nbytes))
        self.D = [first, *(first.clone() for _ in range(copies - 1))]
        self.lengths = torch.full((count,), length, device=device)
        if ragged:
            self.lengths = torch.randint(max(1, length // 10), length + 1, (count,), generator=generator, device=device)
        self.mask = torch.arange(length, device=device) < self.lengths[:, None] if ragged else None

    @functools.cached_property
    def packed(self) -> list[tuple[Tensor, Tensor]]:
        bounds = torch.zeros(len(self.lengths) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(self.lengths, 0, out=bounds[1:])
        keep = torch.arange(self.length, device=self.device) < self.lengths[:, None]
        return [(each[keep], bounds) for each in self.D]

    @functools.cached_property
    def integers(self) -> resident.DeviceEmbeddings:
        tokens, bounds = self.packed[0]
        return resident.from_device(tokens, bounds, None, PackedEmbeddings).to("int8")

    @functools.cached_property
    def one_query(self) -> Tensor:
        """Its boundaries."""
        return torch.tensor([0, self.Q.shape[0]], device=self.device)

    def sample(self) -> Tensor:
        return torch.linspace(0, len(self.lengths) - 1, min(SAMPLE, len(self.lengths))).long()

    def documents(self, turn: int) -> Tensor:
        return self.D[turn % len(self.D)]


def exact_scores(Q: Tensor, D: Tensor, mask: Tensor | None = None) -> Tensor:
    """float64 `[..., Nd]`, some documents at a time."""
    Q, found = Q.double(), []
    size = max(1, EXACT_SIMILARITIES // (Q.numel() // Q.shape[-1] * D.shape[1]))
    for start in range(0, len(D), size):
        similarities = torch.einsum("...id,njd->...nij", Q, D[start : start + size].double())
        if mask is not None:
            similarities = similarities.masked_fill(~mask[start : start + size, None], -torch.inf)
        found.append(similarities.amax(-1).sum(-1))
    return torch.cat(found, -1)


# The contenders: queries [Nq, Lq, d] or [Lq, d], documents [Nd, Ld, d] -> [Nq, Nd] or [Nd]


def eager(Q: Tensor, D: Tensor, mask: Tensor | None = None) -> Tensor:
    """The usual lines of PyTorch, in the dtype of the inputs."""
    similarities = torch.einsum("...id,njd->...nij", Q, D)
    if mask is not None:
        similarities = similarities.masked_fill(~mask[:, None], -torch.inf)
    return similarities.amax(-1).sum(-1)


def eager_widened(Q: Tensor, D: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same with sums in float32."""
    return eager(Q.float(), D.float(), mask)


def missing(package: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no GPU"
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def lik(Q: Tensor, D: Tensor, mask: Tensor | None = None) -> Tensor:
    import late_interaction_kernels

    return late_interaction_kernels.maxsim(Q, D, None, mask)


def flash(Q: Tensor, D: Tensor, mask: Tensor | None = None) -> Tensor:
    from flash_maxsim import flash_maxsim, flash_maxsim_batched

    lengths = None if mask is None else mask.sum(1).int()
    return flash_maxsim(Q, D, lengths) if Q.dim() == 2 else flash_maxsim_batched(Q, D, lengths)


def graphed(call: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    """A captured graph of the call, made when it is first run."""
    state: list[Any] = []

    def replay(_turn: int) -> Tensor:
        if not state:
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            state.extend((graph, result))
        state[0].replay()
        return state[1]

    return replay


def peers(given: Inputs, mask: Tensor | None = None) -> list[Contender]:
    device = given.device
    return [
        Contender("late-interaction-kernels", lambda n: lik(given.Q, given.documents(n), mask),
                  missing("late_interaction_kernels", device)),
        Contender("flash-maxsim", lambda n: flash(given.Q, given.documents(n), mask), missing("flash_maxsim", device)),
    ]  # fmt: skip


def torchs(given: Inputs, mask: Tensor | None = None, compiled: bool = False) -> list[Contender]:
    similarities = given.Q.numel() / given.dim * len(given.lengths) * given.length
    large = "it would hold {:.0f} GB of similarities"
    found = [
        Contender(name, lambda n, f=function: f(given.Q, given.documents(n), mask),
                  None if size * similarities < EAGER_BYTES else large.format(size * similarities / 1e9))
        for name, function, size in (("torch eager", eager, 4), ("torch eager, fp32 sums", eager_widened, 8))
    ]  # fmt: skip
    if compiled:
        function = torch.compile(eager_widened, dynamic=False)
        reason = None if given.device.type == "cuda" else "no GPU"
        found.append(Contender("torch.compile", lambda n: function(given.Q, given.documents(n), mask), reason))
    return found


def score_error(given: Inputs) -> Callable[[Tensor], float]:
    sample = given.sample()
    mask = None if given.mask is None else given.mask[sample]
    wanted = exact_scores(given.Q, given.D[0][sample], mask)
    return lambda scores: (scores[..., sample].double() - wanted).abs().max().item()


def rerank(name: str, count: int, query: int, length: int, dim: int, device: torch.device, **options: Any) -> Case:
    """One query."""
    given = Inputs((query, count), length, dim, device, options.pop("ragged", False))
    tokens = int(given.lengths.sum())
    no_graph = None if device.type == "cuda" else "no GPU"
    ours = [
        Contender("fused", lambda n: maxsim(given.Q, given.documents(n), d_mask=given.mask)),
        # By the wall they are in the device's cache, if they fit there.
        Contender("fused, same documents", lambda _: maxsim(given.Q, given.D[0], d_mask=given.mask)),
        Contender("fused, packed", lambda n: packed_scores(given, n)),
        Contender("fused, packed int8", lambda _: maxsim(given.Q, given.integers)),
        Contender("fused, graph", graphed(lambda: maxsim(given.Q, given.D[0], d_mask=given.mask)), no_graph),
    ]
    return Case(
        name,
        {
            "num_queries": 1,
            "query_length": query,
            "num_documents": count,
            "length": length,
            "dim": dim,
            "tokens": tokens,
        },
        [*ours, *peers(given, given.mask), *torchs(given, given.mask, **options)],
        score_error(given),
        2.0 * query * tokens * dim,
        2.0 * tokens * dim,
        # int8 is off by the rounding of its values
        tolerance=0.3,
        copy=copy_of(given, tokens),
    )


def copy_of(given: Inputs, tokens: int) -> Contender:
    """As many bytes moved as that many tokens are."""
    halves = [each.view(-1)[: tokens * given.dim // 2] for each in given.D]
    target = torch.empty_like(halves[0])
    return Contender("copy", lambda turn: target.copy_(halves[turn % len(halves)]))


def packed_scores(given: Inputs, turn: int) -> Tensor:
    tokens, bounds = given.packed[turn % len(given.packed)]
    return maxsim_varlen(given.Q, tokens, given.one_query, bounds)[0]


def in_batch(name: str, size: int, length: int, dim: int, device: torch.device, compiled: bool = False) -> Case:
    given = Inputs((size, 32, size), length, dim, device)
    return Case(
        name,
        {"num_queries": size, "query_length": 32, "num_documents": size, "length": length, "dim": dim},
        [
            Contender("fused", lambda n: maxsim(given.Q, given.documents(n))),
            *peers(given),
            *torchs(given, compiled=compiled),
        ],
        score_error(given),
        2.0 * size * 32 * size * length * dim,
    )


def training(name: str, size: int, length: int, dim: int, device: torch.device) -> Case:
    """Forward and backward, from a given gradient of the scores."""
    given = Inputs((size, 32, size), length, dim, device)
    grad = torch.randn(size, size, device=device, generator=torch.Generator(device.type).manual_seed(2))
    sample = given.sample()
    Q = given.Q.double()
    documents = given.D[0][sample].double().requires_grad_()
    wanted = []
    for n, document in enumerate(documents):
        score = (Q @ document.T).amax(-1).sum(-1)
        wanted.append(torch.autograd.grad((score * grad[:, sample[n]].double()).sum(), documents)[0][n])
    exact = torch.stack(wanted)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        def call(turn: int) -> tuple[Tensor, ...]:
            q, d = given.Q.detach().requires_grad_(), given.documents(turn).detach().requires_grad_()
            scores = function(q, d)
            return torch.autograd.grad(scores, (q, d), grad.to(scores.dtype))

        return call

    def train_flash(q: Tensor, d: Tensor) -> Tensor:
        from flash_maxsim import flash_maxsim_batched_train

        return flash_maxsim_batched_train(q, d)

    similarities = size * size * 32 * length
    large = [
        None if factor * similarities < EAGER_BYTES else f"it would hold {factor * similarities / 1e9:.0f} GB"
        for factor in (6, 12)
    ]
    return Case(
        name,
        {"num_queries": size, "query_length": 32, "num_documents": size, "length": length, "dim": dim},
        [
            Contender("fused", step(maxsim)),
            Contender("late-interaction-kernels", step(lik), missing("late_interaction_kernels", device)),
            Contender("flash-maxsim", step(train_flash), missing("flash_maxsim", device)),
            Contender("torch eager", step(eager), large[0]),
            Contender("torch eager, fp32 sums", step(eager_widened), large[1]),
        ],
        lambda grads: ((grads[1][sample].double() - exact).norm() / exact.norm()).item(),
        2.0 * size * 32 * size * length * dim,
        rounds=30,
        memory=True,
    )


def contrastive(name: str, size: int, length: int, device: torch.device, temperature: float = 0.02) -> Case:
    """The loss of a batch, forward and backward, at d = 48; scores kept for the backward, and not."""
    given = Inputs((size, 32, size), length, 48, device)
    # Near copies under noise from little to much, so that queries are sure, unsure and wrong.
    noise = torch.linspace(0.2, 4, size, device=device)[:, None, None] * torch.randn_like(given.Q.float())
    first = min(32, length)
    copy = torch.nn.functional.normalize(given.Q.float()[:, :first] + noise[:, :first], dim=-1).to(HALF)
    given.D[0][:, :first] = copy
    given.D = given.D[:1]
    sample, target = given.sample(), torch.arange(size, device=device)

    def step(function: Callable[..., Tensor], **options: Any) -> Callable[[int], tuple[Tensor, ...]]:
        def call(_turn: int) -> tuple[Tensor, ...]:
            q, d = given.Q.detach().requires_grad_(), given.D[0].detach().requires_grad_()
            losses = function(q, d, **options)
            return losses.detach(), *torch.autograd.grad(losses.mean(), (q, d))

        return call

    def eager_loss(q: Tensor, d: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(eager_widened(q, d) / temperature, target, reduction="none")

    large = 12 * size * size * 32 * length
    options: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
    contenders = [
        Contender("fused", step(contrastive_loss, **options)),
        Contender("fused, scores kept", step(contrastive_loss, save_scores=True, **options)),
        Contender("torch eager, fp32 sums", step(eager_loss),
                  None if large < EAGER_BYTES else f"it would hold {large / 1e9:.0f} GB"),
    ]  # fmt: skip
    if device.type == "cuda" and large < EAGER_BYTES:
        contenders.append(Contender("torch.compile", step(torch.compile(eager_loss, dynamic=False))))
    scores = exact_scores(given.Q[sample], given.D[0])
    exact = torch.nn.functional.cross_entropy(scores / temperature, target[sample.to(device)], reduction="none")
    return Case(
        name,
        {"num_queries": size, "query_length": 32, "num_documents": size, "length": length, "dim": 48,
         "temperature": temperature},
        contenders,
        lambda found: ((found[0][sample].double() - exact).abs() / exact.abs().clamp_min(1)).max().item(),
        2.0 * size * 32 * size * length * 48,
        rounds=20,
        fewest=FEWEST_ROUNDS if size < LARGEST else 1,
        memory=True,
    )  # fmt: skip


def distillation(name: str, size: int, candidates: int, length: int, device: torch.device) -> Case:
    flat = Inputs((size, 32, size * candidates), length, 48, device)
    Q, D = flat.Q, flat.D[0].view(size, candidates, length, 48)
    teacher = torch.randn(size, candidates, device=device, generator=torch.Generator(device.type).manual_seed(4))

    def eager_loss(q: Tensor, d: Tensor, teacher: Tensor) -> Tensor:
        scores = torch.einsum("qid,qkjd->qkij", q.float(), d.float()).amax(-1).sum(-1)
        return of_scores(scores, teacher)

    def of_scores(scores: Tensor, teacher: Tensor) -> Tensor:
        lowest, highest = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        log_s = ((scores - lowest) / (highest - lowest + 1e-8)).log_softmax(1)
        return torch.nn.functional.kl_div(log_s, teacher.log_softmax(1), reduction="batchmean", log_target=True)

    def step(function: Callable[..., Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        def call(_turn: int) -> tuple[Tensor, ...]:
            q, d = Q.detach().requires_grad_(), D.detach().requires_grad_()
            loss = function(q, d, teacher)
            return loss.detach(), *torch.autograd.grad(loss, (q, d))

        return call

    scores = torch.stack([exact_scores(q[None], d)[0] for q, d in zip(Q, D, strict=True)])
    exact = of_scores(scores, teacher.double())
    contenders = [Contender("fused", step(distillation_loss)), Contender("torch eager, fp32 sums", step(eager_loss))]
    if device.type == "cuda":
        contenders.append(Contender("torch.compile", step(torch.compile(eager_loss, dynamic=False))))
    return Case(
        name,
        {"num_queries": size, "query_length": 32, "num_documents": candidates, "length": length, "dim": 48},
        contenders,
        lambda found: abs(found[0].item() - exact.item()) / abs(exact.item()),
        2.0 * size * 32 * candidates * length * 48,
        memory=True,
    )


def cases(device: torch.device, quick: bool, tiny: bool) -> Iterator[Callable[[], Case]]:
    """Makers, so that only one case's inputs exist at a time. `tiny` shrinks every shape for a dry run."""

    def at_most(full: int, limit: int) -> int:
        return min(full, limit) if tiny else full

    few, short = functools.partial(at_most, limit=6), functools.partial(at_most, limit=20)
    for dim in (48, 64, 128):
        yield functools.partial(
            rerank, f"1 x 1k x 300, d {dim}", few(1000), short(32), short(300), dim, device, compiled=dim == 128
        )
    yield functools.partial(
        rerank, "1 x 10k x 300 ragged, d 48", few(10000), short(32), short(300), 48, device, ragged=True
    )
    yield functools.partial(
        rerank, "1 x 4k x 2048 ragged, d 48", few(4000), short(32), short(2048), 48, device, ragged=True
    )
    for dim in (48, 64, 128):
        yield functools.partial(
            in_batch, f"128 x 128 x 32 x 300, d {dim}", few(128), short(300), dim, device, compiled=dim == 128
        )
    yield functools.partial(rerank, "1 x 1k x 1024 x 1024, d 128", few(1000), short(1024), short(1024), 128, device)
    for size, dim in ((128, 128), (1024, 128), (1024, 48)):
        yield functools.partial(training, f"forward + backward {size}, d {dim}", few(size), short(180), dim, device)
    yield functools.partial(distillation, "KL 128 x 16", few(128), at_most(16, 4), short(180), device)
    sizes = ((128, 180), (1024, 180), (4096, 180), (24576, 220))
    for size, length in sizes[:3] if quick else sizes:
        yield functools.partial(contrastive, f"contrastive loss {size}", few(size), short(length), device)
