"""Which blocks at the top of a network a run does not use any more, so that they can be cut off while it goes on."""

from typing import Any

from acn_scale.config import DepthConfig
from acn_scale.depth import cutoff


class DeadBlocks:
    """Watches for blocks at the top that a run does not use any more. Its state is part of a checkpoint.

    At an evaluation, the blocks above depth k are dead where each of them changes the logits by less than
    `cfg.dead_below` of their size, none has had more than that share of the gradient's norm since the evaluation
    before, and the accuracy at depth k is within `tolerance` points of full depth. (In an ACN blocks die from the top
    down: Dorovatas et al. 2025, Fig. 2, and the traces beside their code.)
    """

    def __init__(self, cfg: DepthConfig, tolerance: float) -> None:
        self.cfg, self.tolerance = cfg, tolerance
        self.shares: dict[str, float] = {}  # of each block, the largest since the last evaluation
        self.depths: list[int] = []  # lowest one with dead blocks alone above it, at each evaluation

    def note_gradients(self, norms: dict[str, float]) -> None:
        """The norms of a step's gradient: of "block_01", ... and of "all"."""
        for name, norm in norms.items():
            self.shares[name] = max(self.shares.get(name, 0.0), norm / max(norms["all"], 1e-30))

    def depth_to_keep(self, accuracy: list[float], change: list[float]) -> int:
        """After an evaluation: the depth to cut at; full depth where nothing is to be cut."""
        full = len(accuracy) - 1
        alive = [depth for depth in range(1, full + 1) if not self._dead(depth, change[depth])]
        self.depths.append(max([cutoff(accuracy, self.tolerance), 1, *alive]))
        self.shares.clear()
        if len(self.depths) < self.cfg.evaluations:
            return full
        keep = max(self.depths[-self.cfg.evaluations :])
        if keep < full:
            self.depths.clear()
        return keep

    def _dead(self, depth: int, change: float) -> bool:
        share = self.shares.get(f"block_{depth:02d}", 1.0)  # one that no gradient is known of lives
        return max(change, share) < self.cfg.dead_below

    def state_dict(self) -> dict[str, Any]:
        return {"shares": self.shares, "depths": self.depths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shares, self.depths = dict(state["shares"]), list(state["depths"])
