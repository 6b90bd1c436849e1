"""Settings of one oracle decode."""

from dataclasses import dataclass, replace

METHODS = ("blockbatch", "vanilla", "prefix_cache", "dual_cache", "local_leap")
WITH_CHEAPER_FORWARDS = ("blockbatch", "dual_cache", "local_leap")


@dataclass(frozen=True)
class OracleConfig:
    """The public settings, under their public names. `resolve` gives what the loop works with.

    eos_exit None means the method's default: "prefix" for blockbatch, "none" for the baselines.
    steps None means gen_length. `block_size`, `steps` serve the baselines, `block_sizes` blockbatch alone.
    tail_threshold: of masks behind the window's first mask below threshold; None: the threshold.
    threshold None (baselines only) commits a fixed number of tokens per step.
    commit: "threshold" or "local_leap"; the method local_leap always uses the latter.
    query_span: what a block denoise computes, "window" or "open"; refresh_scope: what a refresh computes,
    "canvas" or "generation". Neither can be changed for vanilla and prefix_cache.
    """

    method: str = "blockbatch"
    gen_length: int = 256
    block_sizes: tuple = (4, 8, 16, 32, 64, 128)
    threshold: float | None = 0.9
    tail_threshold: float | None = None
    merge_threshold: float = 0.5
    sync_threshold: int = 8
    refresh_interval: int | None = 32
    eos_exit: str | None = None
    steps: int | None = None
    block_size: int = 32
    commit: str = "threshold"
    leap_radius: int = 4
    leap_threshold: float = 0.75
    query_span: str = "window"
    refresh_scope: str = "canvas"

    def resolve(self):
        """The same settings with every baseline expressed as one branch of the common loop.

        A baseline's single branch asks for a refresh at every new block (dual and prefix cache, LocalLeap)
        or never (vanilla, whose every forward is full). `commit` becomes "fixed" where k tokens are
        committed per step.
        """
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {self.method!r}")
        if self.method not in WITH_CHEAPER_FORWARDS and (self.query_span, self.refresh_scope) != (
            "window",
            "canvas",
        ):
            raise ValueError(f"query_span, refresh_scope: not options of {self.method}")
        if self.method == "blockbatch":
            if self.threshold is None:
                raise ValueError("threshold: blockbatch expects a number, got None")
            return replace(
                self, block_sizes=tuple(sorted(self.block_sizes)), eos_exit=self.eos_exit or "prefix"
            )
        if self.method == "local_leap" and self.threshold is None:
            raise ValueError("threshold: local_leap expects a number, got None")
        if self.method == "vanilla":
            commit, refresh_interval = "fixed", None
        else:
            commit = "fixed" if self.threshold is None else self.commit
            refresh_interval = self.block_size
        if self.method == "local_leap":
            commit = "local_leap"
        return replace(
            self,
            block_sizes=(self.block_size,),
            refresh_interval=refresh_interval,
            eos_exit=self.eos_exit or "none",
            steps=self.steps or self.gen_length,
            commit=commit,
        )
