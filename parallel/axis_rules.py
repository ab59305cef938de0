"""Where each logical axis of a tensor lies in the mesh (data, expert, model): one table (as in t5x).

Rows are shared out over data and expert together, so outside of MoE layers the expert axis is a data axis.
Dense weights are copies over both; the model axis cuts their vocabulary, heads and hidden units. An expert
lies along the expert axis, and its hidden units along the model axis.
"""

from openmoe.optim.factor_rules import PARAMETER_AXES

MESH_AXES = ("data", "expert", "model")

AXIS_RULES: dict[str, tuple[str, ...]] = {
    # of parameters, and of the optimizer's state, which keeps some axes of its parameter
    "vocab": ("model",),
    "joined_kv": ("model",),
    "mlp": ("model",),
    "expert": ("expert",),
    "expert_mlp": ("model",),
    "embed": (),
    "mlp_embed": (),
    "unmodeled": (),
    # of activations
    "rows": ("data", "expert"),
    "positions": (),
    "groups": ("data", "expert"),  # routing groups are whole rows
    "experts_of_group": (),  # tokens of one group for all experts ...
    "groups_of_expert": ("data",),  # ... and of some groups for one expert
    "slots": (),
}

Spec = tuple[tuple[str, ...] | None, ...]  # mesh axes of each dimension; None = not cut


def spec_of(axes: tuple[str, ...]) -> Spec:
    """The mesh axes of a tensor whose dimensions have these logical axes.

    Raises KeyError for one that the table does not know.
    """
    return tuple(AXIS_RULES[axis] or None for axis in axes)


def parameter_spec(name: str, dims: int) -> Spec:
    """The mesh axes of the parameter `name`, which has `dims` dimensions.

    Raises ValueError for a parameter without logical axes.
    """
    for ending, (axes, _) in PARAMETER_AXES.items():
        if name.endswith(ending):
            spec = spec_of(axes)
            halves = dims - len(axes)  # of the four-matrix FFN's wi_0, in front of its hidden units
            place = axes.index("expert_mlp" if "expert_mlp" in axes else "mlp") if halves else 0
            return (*spec[:place], *(None,) * halves, *spec[place:])
    raise ValueError(f"no logical axes for the parameter {name}; known endings: {', '.join(PARAMETER_AXES)}")
