"""The gradient flow itself: the equations of section 3 as ODEs, and Algorithm 1 with its sub-steps solved exactly.

Needs diffrax, an extra: ``pip install ".[dynamics]"``. Meant for float64 (``jax.enable_x64(True)``) and small kernels:
gradients with respect to full kernels are formed.
"""

try:
    import diffrax as _diffrax  # noqa: F401
except ImportError as error:
    raise ImportError('tdlrt_jax.dynamics needs diffrax: pip install ".[dynamics]"', name="diffrax") from error

from tdlrt_jax.dynamics.flows import Flow, MovingFrame, factor_flow, full_flow, kc_flow, projected_flow
from tdlrt_jax.dynamics.momentum import Rolling, dense_velocity, factor_heavy_ball_flow, full_heavy_ball_flow
from tdlrt_jax.dynamics.solve import SOLVERS, Statistics, Trajectory, integrate
from tdlrt_jax.dynamics.step import FlowStepInfo, flow_step
from tdlrt_jax.dynamics.tangent import chart_coordinates, chart_to_dense, project, tangent_coordinates, tangent_to_dense

__all__ = [
    "SOLVERS",
    "Flow",
    "FlowStepInfo",
    "MovingFrame",
    "Rolling",
    "Statistics",
    "Trajectory",
    "chart_coordinates",
    "chart_to_dense",
    "dense_velocity",
    "factor_flow",
    "factor_heavy_ball_flow",
    "flow_step",
    "full_flow",
    "full_heavy_ball_flow",
    "integrate",
    "kc_flow",
    "project",
    "projected_flow",
    "tangent_coordinates",
    "tangent_to_dense",
]
