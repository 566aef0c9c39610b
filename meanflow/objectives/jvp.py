"""MeanFlow's total derivative. The network needs no change, and the derivative costs one extra forward.

`torch.func.jvp` of a network costs three forwards: PyTorch's rule for linear layers and convolutions also multiplies
the primal by a zero tangent of the weight. With gradients it keeps the tangent's activations, too, for a backward that
never comes. Here each operation runs once as usual, with its graph and its fused kernel, and its tangent is computed
beside it without a graph. A dual is a tensor together with its tangent.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph_placeholder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten
MAX_SCORES = 2**26  # attention probabilities in memory at once, in a tangent: 256 MiB in float32
REGISTERED = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def jvp(fn: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """fn(*primals) with its graph, and its derivative along the tangents, detached.

    It is called like `torch.func.jvp`, and takes its place where no gradient is wanted through the derivative.

    Args:
        fn: any network; it returns a tensor or a nest of tensors. What it reads beside its arguments is a constant.
        primals, tangents: floating-point tensors, pairwise of one shape and dtype.
    Raises:
        ValueError: primals and tangents do not match.
        RuntimeError: from PyTorch: an operation has no forward-mode derivative; the message names it.
    """
    if len(primals) != len(tangents):
        raise ValueError(f"{len(primals)} primals but {len(tangents)} tangents")
    for p, d in zip(primals, tangents):
        if p.shape != d.shape or p.dtype != d.dtype:
            raise ValueError(f"a primal is {tuple(p.shape)} {p.dtype}, its tangent {tuple(d.shape)} {d.dtype}")
    with torch.autograd.forward_ad.dual_level():
        # Some releases of torch cannot compile views as dual inputs: hence contiguous().
        duals = [join(p.contiguous(), d.detach().contiguous()) for p, d in zip(primals, tangents)]
        # A compiled network's own code would lose the tangents without an error.
        uncompiled = nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")
        with SharedPrimal(), uncompiled:
            out = fn(*duals)
        out = tree_map_only(Tensor, split, out)
        u = tree_map_only(Dual, lambda x: x.p, out, is_leaf=is_dual)
        du = tree_map_only(Dual, lambda x: torch.zeros_like(x.p) if x.d is None else x.d.detach(), out, is_leaf=is_dual)
        return u, du


def support_fsdp2() -> None:
    """Lets duals through networks that torch's fully_shard wraps.

    Its hook returns views of its inputs, but the tangents unchanged. Forward AD refuses that: they must be views, too.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction

    RegisterPostBackwardFunction.jvp = staticmethod(lambda ctx, _, *tangents: tuple(d.view_as(d) for d in tangents))


def finite_difference(fn: Callable, primals: tuple, tangents: tuple, step: float = 0.005) -> tuple[Any, Any]:
    """Does the same by central differences, for networks without forward-mode derivatives, with two more forwards.

    The derivative's error is step^2 / 6 times the third derivative, plus rounding over step: below 1e-3 of the largest
    entry for a DiT in float32. The two forwards run without autocast: in bfloat16 rounding is 12 % and more.
    """
    out = fn(*primals)
    with torch.no_grad(), torch.autocast(primals[0].device.type, enabled=False):
        ahead, behind = (fn(*(p + sign * step * d for p, d in zip(primals, tangents))) for sign in (1, -1))
        return out, tree_map(lambda a, b: (a - b) / (2 * step), ahead, behind)


class Dual(NamedTuple):
    p: Tensor  # the primal, with its graph
    d: Tensor | None  # the tangent, without one; None for a constant


def is_dual(x: Any) -> bool:
    return isinstance(x, Dual)


# These call what is below forward_ad's wrappers: the wrappers take a fifth of a small network's time.
def split(x: Tensor) -> Dual:
    if not has_derivative(x):
        return Dual(x, None)
    p, d = torch._unpack_dual(x, level=0)
    # An operation that runs by PyTorch's own forward mode gives the tangent a graph, too.
    return Dual(p, d.detach() if d is not None and d.requires_grad else d)


def has_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def join(p: Tensor, d: Tensor | None) -> Tensor:
    return p if d is None else torch._make_dual(p, d if d.dtype == p.dtype else d.to(p.dtype), level=0)


def replace(kind: type, fn: Callable, x: Any) -> Any:
    """x, the arguments or results of an operation, with fn applied to all of this kind. (torch's pytree is slower.)"""
    if isinstance(x, kind):
        return fn(x)
    if isinstance(x, (list, tuple)):
        return type(x)([replace(kind, fn, item) for item in x])
    if isinstance(x, dict):
        return {key: replace(kind, fn, value) for key, value in x.items()}
    return x


def primal(x: Any) -> Any:
    """x with every Dual in it replaced by its primal."""
    return replace(Dual, lambda dual: dual.p, x)


def constant(x: Any) -> Any:
    """x with every Dual in it replaced by its primal without the graph."""
    return replace(Dual, lambda dual: dual.p.detach(), x)


class SharedPrimal(torch.overrides.TorchFunctionMode):
    """Computes, for each operation on duals, the primal once as usual, and then the tangent under no_grad.

    Args:
        tangents: where tangents are kept, by their primals. If None, PyTorch's dual tensors hold them, which cannot
            enter what torch.compile compiles by itself: a nested region or a checkpointed block.
    """

    def __init__(self, tangents: dict[Tensor, Tensor] | None = None):
        super().__init__()
        self.level, self.tangents = torch._C._functorch.maybe_current_level(), tangents

    def split(self, x: Tensor) -> Dual:
        return split(x) if self.tangents is None else Dual(x, self.tangents.get(x))

    def join(self, p: Tensor, d: Tensor | None) -> Tensor:
        if self.tangents is None:
            return join(p, d)
        if d is not None:
            self.tangents[p] = d
        return p

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if "out" in kwargs and kwargs["out"] is None:  # the same as no out
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        if func is F.dropout:
            return self.dropout(*args, **kwargs)
        if func is invoke_subgraph_placeholder or func is checkpoint:
            return self.call_whole(func, *args, **kwargs)
        # The network may call torch.func.grad or vmap. Only PyTorch can read the tangents of tensors inside these.
        transformed = torch._C._functorch.maybe_current_level() != self.level
        by_pytorch = transformed or must_run_once(func, args, kwargs)
        if by_pytorch and self.tangents is None:
            with sdpa_kernel(SDPBackend.MATH) if "attention" in func.__name__ else nullcontext():
                return func(*args, **kwargs)  # by PyTorch's own forward mode
        args, kwargs, duals = self.unpack(args, kwargs)
        out = func(*map(primal, args), **(primal(kwargs) if kwargs else kwargs))
        outs = out if isinstance(out, (list, tuple)) else [out]
        if not transformed and (all(x.d is None for x in duals) or not any(has_derivative(x) for x in outs)):
            return out
        rule = rule_of(func, args, kwargs)
        if self.tangents is not None and (by_pytorch or rule is forward_mode):
            raise NotImplementedError(f"{func.__name__} has no rule in objectives/jvp.py: it cannot be compiled here")
        with torch.no_grad():
            tangent = rule(func, out, *args, **kwargs)
        if isinstance(out, Tensor):
            return self.join(out, tangent)
        return type(out)([self.join(p, d) for p, d in zip(out, tangent)])

    def unpack(self, args: tuple, kwargs: dict) -> tuple[list, dict, list[Dual]]:
        """An operation's arguments with every tensor in them as a Dual, and a list of these."""
        duals = []

        def split_and_note(x: Tensor) -> Dual:
            duals.append(self.split(x))
            return duals[-1]

        args = [split_and_note(x) if isinstance(x, Tensor) else replace(Tensor, split_and_note, x) for x in args]
        kwargs = replace(Tensor, split_and_note, kwargs) if kwargs else kwargs
        return args, kwargs, duals

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Dropout with one mask for the primal and the tangent.

        It saves the same tensors as PyTorch's own dropout, because a checkpointed block runs again without duals.
        """
        x = self.split(input)
        if not training or not p:
            return input
        if x.p.is_cuda:
            out, mask = torch.native_dropout(x.p, p, True)
            mask = mask / (1 - p)
        else:
            mask = F.dropout(torch.ones_like(x.p), p)
            out = x.p * mask
        return out if x.d is None else self.join(out, x.d * mask)

    def call_whole(self, func: Callable, fn: Callable, *args, **options) -> Tensor:
        """A call that torch.compile traces by itself: fn of tensors as a nested region, or as a checkpointed block."""
        args, _, duals = self.unpack(args, {})
        if all(x.d is None for x in duals):
            return func(fn, *map(primal, args), **options)
        block, inputs = (fn, args) if func is checkpoint else (args[0], args[1:])
        if not all(map(is_dual, inputs)) or (options and func is not checkpoint):
            # PyTorch's own error where a derivative in forward mode is lacking.
            words = "must take only tensors, by position, to be compiled or checkpointed"
            raise NotImplementedError(f"{type(block).__name__} {words}")
        tensors = [x.p for x in duals] + [x.d for x in duals]
        if func is checkpoint:
            return self.join(*checkpoint(with_tangents, fn, *tensors, **options))
        return self.join(*block_with_tangents(block, *tensors))


def with_tangents(fn: Callable, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """fn of the first half of the tensors, and its tangent; the second half are the tangents of the first."""
    half = len(tensors) // 2
    primals, tangents = tensors[:half], tensors[half:]
    mode = SharedPrimal({p: d for p, d in zip(primals, tangents) if d is not None})
    with mode:
        out = fn(*primals)
    return out, mode.tangents[out].detach()


@torch.compiler.nested_compile_region
def block_with_tangents(block: torch.nn.Module, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """As with_tangents, for a module whose forward is a nested region of torch.compile: it stays one."""
    return with_tangents(partial(type(block).forward.__marked_compile_region_fn__, block), *tensors)


def rule_of(func: Callable, args: list, kwargs: dict) -> Callable:
    """The rule for the tangent of this call.

    Every rule knows its first tensor by its place, and the rules of two tensors know both. A call that gives one of
    them by keyword is rare, and goes to PyTorch's forward mode. So does a layer whose weight or bias has a tangent.
    """
    rule = forward_mode if isinstance(func, REGISTERED) else RULES.get(func.__name__, forward_mode)
    by_keyword = not args or (rule in (add, bilinear, multiply) and any(map(is_dual, kwargs.values())))
    if by_keyword or (
        rule in (affine, layer_norm, group_norm, rms_norm) and not is_constant(*args[1:], *kwargs.values())
    ):
        return forward_mode
    return rule


# These run only once: random operations, those with running statistics, properties and hooks, and those in place.
ONCE = {"bernoulli", "multinomial", "normal", "poisson", "rrelu", "gumbel_softmax", "multi_head_attention_forward"}
ONCE |= {"batch_norm", "instance_norm", "__get__", "__set__", "__setitem__", "register_hook"}
ONCE |= {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
DROPOUT_P = 4  # the place of dropout_p among the arguments of scaled_dot_product_attention


def must_run_once(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call must not run a second time for its tangent: it is random, or it changes a tensor."""
    name = func.__name__
    if name in RECURRENT:
        return all(args[5:7])  # dropout between the layers, and training
    if func is F.scaled_dot_product_attention:
        dropout_p = args[DROPOUT_P] if len(args) > DROPOUT_P else kwargs.get("dropout_p", 0.0)
        return dropout_p > 0
    in_place = kwargs.get("inplace", False) or (name.endswith("_") and not name.endswith("__"))
    is_random = "dropout" in name or name.startswith(("rand", "fractional"))
    return name in ONCE or in_place or is_random or kwargs.get("out") is not None


def forward_mode(func: Callable, out: Any, *args, **kwargs) -> Any:
    """The tangent by PyTorch's forward mode, for operations without a rule. The primal is computed a second time."""
    args, kwargs = (replace(Dual, lambda x: join(x.p.detach(), x.d), x) for x in (args, kwargs))
    # The fused kernels have no forward-mode derivative. Gradients are on only for a view, for the reason given in
    # linear_in_first: some derivatives, such as mish's, give slightly different numbers then.
    is_view = not torch.compiler.is_compiling() and isinstance(out, Tensor) and out._is_view()
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(is_view):
        out = func(*args, **kwargs)
    d = replace(Tensor, lambda x: split(x).d, out)
    # Operations that others register, such as torchvision's deform_conv2d, lose the tangent without an error.
    if isinstance(func, REGISTERED) and not str(func).startswith("aten."):
        if all(x is None for x in (d if isinstance(d, (list, tuple)) else [d])):
            raise NotImplementedError(f"{func} has no forward-mode derivative")
    return d


def is_constant(*args) -> bool:
    """Whether none of an operation's arguments carries a tangent."""
    return all(x.d is None for x in args if is_dual(x))


def linear_in_first(func: Callable, out: Any, x: Dual, *args, **kwargs) -> Any:
    """f(x) with f linear, such as a change of shape: df = f(dx)."""
    if kwargs.get("rounding_mode") or not is_constant(*args, *kwargs.values()):
        return forward_mode(func, out, x, *args, **kwargs)
    # The tangent may be a view, as of x[:, :8], and the network may write into it, as by *= weight. PyTorch refuses
    # this for a view that was made without gradients. It builds no graph, because no input here has one.
    with torch.enable_grad():
        return func(x.d, *constant(args), **constant(kwargs))


def bilinear(func: Callable, out: Tensor, a: Any, b: Any) -> Tensor:
    """f(a, b) with f linear in each: df = f(da, b) + f(a, db)."""
    if is_constant(a):
        return func(primal(a), b.d)
    d = func(a.d, primal(b))
    return d if is_constant(b) else d.add_(func(primal(a), b.d))


def multiply(func: Callable, out: Tensor, a: Any, b: Any) -> Tensor:
    """Same as bilinear, with one pass over memory fewer."""
    if is_constant(a) or is_constant(b):
        return bilinear(func, out, a, b)
    return (a.d * b.p).addcmul_(a.p, b.d)


def add(func: Callable, out: Tensor, a: Any, b: Any, **kwargs) -> Tensor:
    if not is_constant(a) and not is_constant(b):
        return func(a.d, b.d, **kwargs)
    d = b.d if is_constant(a) else a.d
    # A copy, since the network may write into the sum, as by x + 1 and then *= 2, which must not change the summand.
    return d.clone() if d.shape == out.shape and not kwargs else forward_mode(func, out, a, b, **kwargs)


def affine(func: Callable, out: Tensor, x: Dual, weight: Dual, bias: Dual | None = None, *args, **kwargs) -> Tensor:
    """Linear layers and convolutions: df = f(dx, W), without the zero tangents' products of PyTorch's rule."""
    return func(x.d, weight.p, None, *args, **kwargs)


def gelu(func: Callable, out: Tensor, x: Dual, approximate: str = "none") -> Tensor:
    """An elementwise function's Jacobian is diagonal, so its backward kernel is its tangent, in one pass."""
    return aten.gelu_backward(x.d, x.p, approximate=approximate)


def silu(func: Callable, out: Tensor, x: Dual, inplace: bool = False) -> Tensor:
    return aten.silu_backward(x.d, x.p)


def layer_norm(func, out: Tensor, x: Dual, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    """The Jacobian of a normalisation is symmetric, so its backward kernel is its tangent, before the scale.

    torch.layer_norm has an argument more than F.layer_norm, which changes no number.
    """
    _, mean, rstd = torch.native_layer_norm(x.p, normalized_shape, None, None, eps)
    d, _, _ = aten.native_layer_norm_backward(x.d, x.p, normalized_shape, mean, rstd, None, None, [True, False, False])
    return d if weight is None else d * weight.p


def group_norm(func, out: Tensor, x: Dual, num_groups: int, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    """As layer_norm."""
    p, d = (a.to(out.dtype).contiguous() for a in (x.p, x.d))  # autocast may have made it float32
    size = (*p.shape[:2], p[0, 0].numel())
    _, mean, rstd = torch.native_group_norm(p, None, None, *size, num_groups, eps)
    d, _, _ = aten.native_group_norm_backward(d, p, mean, rstd, None, *size, num_groups, [True, False, False])
    return d if weight is None else d * weight.p.view(-1, *[1] * (p.ndim - 2))


def rms_norm(func, out: Tensor, x: Dual, normalized_shape, weight: Dual | None = None, eps: float | None = None):
    """With n = x / s and s = sqrt(mean(x^2) + eps): dn = (dx - n mean(n dx)) / s, before the scale."""
    p, d = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (x.p, x.d))
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.p.dtype).eps if eps is None else eps
    inverse = (p.square().mean(axes, keepdim=True) + eps).rsqrt()
    n = p * inverse
    d = (d - n * (n * d).mean(axes, keepdim=True)) * inverse
    return (d if weight is None else d * weight.p).to(out.dtype)


def cat(func: Callable, out: Tensor, tensors: list[Dual], *args, **kwargs) -> Tensor:
    return func([torch.zeros_like(x.p) if x.d is None else x.d for x in tensors], *args, **kwargs)


def attention(func, out: Tensor, query: Dual, key: Dual, value: Dual, *masks, scale: float | None = None, **options):
    """The tangent of attention, a chunk of queries at a time, so that no more than MAX_SCORES of P are in memory."""
    if is_constant(query) or is_constant(key) or is_constant(value) or any(masks) or any(options.values()):
        return forward_mode(func, out, query, key, value, *masks, scale=scale, **options)
    q, k, v, dq, dk, dv = (x.contiguous() for x in (query.p, key.p, value.p, query.d, key.d, value.d))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores_of_a_query = q[..., 0, 0].numel() * k.shape[-2]  # in all heads of all samples
    queries = max(1, MAX_SCORES // scores_of_a_query)
    chunks = zip(*(x.split(queries, dim=-2) for x in (q * scale, dq * scale, out)))
    tangents = [attention_tangent(*chunk, k, v, dk, dv) for chunk in chunks]
    return torch.cat(tangents, dim=-2) if len(tangents) > 1 else tangents[0]


def attention_tangent(q, dq, out, k, v, dk, dv) -> Tensor:
    """P = softmax(S), S = q k': dS = dq k' + q dk', dout = (P * dS) v - rowsum(P * dS) out + P dv; q, dq are scaled."""
    k_t, at_least_float32 = k.transpose(-1, -2), torch.promote_types(q.dtype, torch.float32)
    p = torch.softmax(q @ k_t, dim=-1, dtype=at_least_float32)
    p_ds = (dq @ k_t).add_(q @ dk.transpose(-1, -2)) * p
    d = (p_ds.to(v.dtype) @ v).add_(p.to(v.dtype) @ dv)
    return d.addcmul_(p_ds.sum(dim=-1, keepdim=True), out, value=-1)


# By name: torch.compile cannot look up the functions themselves. A name stands for a function of torch, of
# torch.nn.functional and for the method of Tensor, which take the same arguments in the same order.
RULES: dict[str, Callable] = {
    **{rule.__name__: rule for rule in (gelu, silu, layer_norm, group_norm, rms_norm, cat)},
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d"), affine),
    **dict.fromkeys(("add", "__add__", "__radd__"), add),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), multiply),
    **dict.fromkeys(("matmul", "bmm"), bilinear),
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"), linear_in_first),
    **dict.fromkeys(("permute", "transpose", "unbind", "chunk", "__getitem__", "to", "interpolate"), linear_in_first),
    **dict.fromkeys(("div", "__truediv__"), linear_in_first),
}
