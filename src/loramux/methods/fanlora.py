"""FanLoRA: find once which few linears of each layer matter, and put LoRA only there, for every task. A reconstruction.

Tian, Zhao, Yin, Zhu, Tian, Ge, FanLoRA: Fantastic LoRAs and Where to Find Them in Large Language Model Fine-tuning,
EMNLP 2024 Industry Track. Only the abstract could be read: LoRA on all linears, tuned on instruction data; a score for
every module; the most important ones of each layer kept; that placement used for all tasks. The score, how many are
kept and all hyperparameters below are ours, and nothing here is the paper's scoring rule.

    probe        y = W x + c s B^T A x            at every linear, c = 1
    I(l, m)      S(M) - S(M without m) + S(base with m alone)         S = minus cross-entropy; "ablation"
    downstream   a plain LoRA at the n_keep linears of each layer with the highest I; nothing at the others

`loramux train` does all of it when no setting is named, and writes the setting to the run's folder for other tasks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.core.attach import Attachment
from loramux.core.bank import Rows
from loramux.core.method import Method, MethodConfig, Probe
from loramux.core.placement import Setting, choose, make_setting, names_by_layer
from loramux.core.types import Expert, Site
from loramux.core.values import check_whole
from loramux.methods.lora import LoraConfig

log = logging.getLogger(__name__)
PROBE = "probe/adapter"  # beside the setting, in the folder of the run that made both
N_KEEP = 2  # ours: the smallest number that the abstract's plural allows
WITHOUT_DATA = ("random", "fixed")


@dataclass(frozen=True, kw_only=True)
class FanLoRAConfig(MethodConfig):
    """setting: the file that a run without it wrote; None: the probe itself, LoRA on all targeted linears.

    n_keep: linears kept per layer (None: the setting's own, 2 for a new one); per: "layer", or "model" for the best
    n_keep * layers over the whole model. scorer: how modules are scored; "random" (with `placement_seed`) and "fixed"
    (`keep`, ends of names) choose without data, as controls. score_rows: held-out examples that are scored.
    match_r: choose r so that the parameters are at most those of a LoRA of this rank on all targeted linears; budget:
    the same with a number of parameters. probe_r, probe_steps (None: as long as the job): of the probe.
    init_from_probe: start from the probe's weights (needs r = probe_r) instead of fresh ones.
    """

    method = "fanlora"

    setting: str | None = None
    n_keep: int | None = None
    per: Literal["layer", "model"] = "layer"
    scorer: Literal[
        "ablation",
        "taylor",
        "output_norm",
        "relative_output_norm",
        "sensitivity",
        "random",
        "fixed",
    ] = "ablation"
    keep: tuple[str, ...] = ()
    placement_seed: int = 0
    score_rows: int = 256
    match_r: int | None = None
    budget: int | None = None
    probe_r: int = 32
    probe_steps: int | None = None
    init_from_probe: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        for name in ("n_keep", "match_r", "budget", "probe_steps"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        for name in ("score_rows", "probe_r"):
            check_whole(name, getattr(self, name))
        check_whole("placement_seed", self.placement_seed, least=0)
        if self.setting is not None and not isinstance(self.setting, str):
            raise ValueError(f"setting must be the name of a file, got {self.setting!r}")
        if (self.scorer == "fixed") != bool(self.keep):
            raise ValueError(
                'scorer="fixed" keeps the linears named in `keep`; give both or neither'
            )
        if self.match_r is not None and self.budget is not None:
            raise ValueError("match_r and budget both choose r; give one of them")
        if self.rank_pattern and (self.match_r or self.budget):
            raise ValueError("match_r and budget choose one rank for all; leave rank_pattern out")
        if self.init_from_probe and self.scorer in WITHOUT_DATA:
            raise ValueError(f'scorer="{self.scorer}" has no probe to start from')

    def default_alpha(self) -> float:
        return float(self.r)


class FanLoRAMethod(Method):
    name = "fanlora"
    title = "FanLoRA"
    paper = "EMNLP 2024 Industry Track (2024.emnlp-industry.38)"
    granularity = "module"
    routing_unit = "none"
    servability = "static"
    config_class = FanLoRAConfig
    default_learning_rate = 1e-4
    config: FanLoRAConfig

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.setting: Setting | None = None
        self.matched_r: int | None = None

    def probe(self) -> Probe | None:
        config = self.config
        if config.setting is not None or config.scorer in WITHOUT_DATA:
            return None
        everywhere = LoraConfig(
            r=config.probe_r,
            lora_alpha=float(config.probe_r),
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
        )
        return Probe(everywhere, config.probe_steps, config.score_rows)

    def check_probe(self, sites: Sequence[Site]) -> None:
        """With the placement that costs least; a dearer one may still exceed the budget."""
        costs: dict[int, dict[str, float]] = {}
        for site in sites:
            costs.setdefault(site.layer, {})[site.name] = -float(site.d_in + site.d_out)
        scores = [costs[layer] for layer in sorted(costs)]
        mask = choose(scores, self.config.n_keep or N_KEEP, self.config.per)
        self._matching_rank(sites, _at(sites, mask))

    def identity(self) -> dict[str, Any]:
        same = super().identity()
        if self.setting is not None:
            text = json.dumps(self.setting.to_json(), sort_keys=True)
            same["setting"] = hashlib.sha256(text.encode()).hexdigest()
        return same

    def score_probe(self, handle: Attachment, batches: Sequence[Mapping[str, Tensor]]) -> Any:
        config = self.config
        setting = make_setting(
            handle, batches, n_keep=config.n_keep or N_KEEP, scorer=config.scorer, per=config.per
        )
        return replace(setting, probe=PROBE).to_json()

    def kept_sites(self, sites: Sequence[Site]) -> list[Site]:
        kept = self._kept(sites)
        self.matched_r = self._matching_rank(sites, kept)
        return kept

    def _kept(self, sites: Sequence[Site]) -> list[Site]:
        config = self.config
        if config.setting is not None:
            self.setting = read_setting(config.setting)
            self.setting.check(sites)
            if config.n_keep is None and config.per != self.setting.per:
                raise ValueError(
                    f"{config.setting} chose per {self.setting.per}, this config asks per {config.per}; set per to the "
                    "setting's, or n_keep as well to choose anew from its scores"
                )
            return _at(sites, self.setting.mask(config.n_keep, config.per))
        if config.scorer == "fixed":
            return _fixed(sites, config.keep)
        if config.scorer == "random":
            draw = torch.Generator().manual_seed(config.placement_seed)
            scores = [
                dict(zip(names, torch.rand(len(names), generator=draw).tolist(), strict=True))
                for names in names_by_layer(sites)
            ]
            return _at(sites, choose(scores, config.n_keep or N_KEEP, config.per))
        log.info("no setting is named: this adapter is the probe, LoRA on every targeted linear")
        return list(sites)

    def _matching_rank(self, sites: Sequence[Site], kept: Sequence[Site]) -> int | None:
        """The largest rank within the budget, one for all kept linears."""
        config = self.config
        budget = config.budget
        if config.match_r is not None:
            budget = config.match_r * sum(site.d_in + site.d_out for site in sites)
        if budget is None:
            return None
        rank = budget // sum(site.d_in + site.d_out for site in kept)
        if rank < 1:
            raise ValueError(
                f"a budget of {budget} parameters is less than rank 1 at the kept linears, which takes "
                f"{sum(site.d_in + site.d_out for site in kept)}; raise match_r or budget, or keep fewer"
            )
        return rank

    def experts(self, site: Site) -> list[Expert]:
        # The scale stays that of the configured rank, so that matching a budget does not change it.
        usual = Expert(self.config.rank_at(site.path), self.config.scale_at(site.path))
        return [usual if self.matched_r is None else Expert(self.matched_r, usual.scale)]

    def start_rows(self, site: Site, rows: Rows) -> None:
        if not self.config.init_from_probe or self.setting is None:
            return
        if self.setting.probe is None:
            raise ValueError(f"{self.config.setting} names no probe to start from")
        _copy_probe(Path(str(self.config.setting)).parent / self.setting.probe, site, rows)


def read_setting(path: str) -> Setting:
    """A setting file; ValueError for what is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the setting {path} cannot be read ({error.strerror}); a fanlora run without a setting writes one"
        ) from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON, so it is no setting") from None
    return Setting.from_json(value, path)


def _at(sites: Sequence[Site], mask: Sequence[dict[str, bool]]) -> list[Site]:
    numbers = sorted({site.layer for site in sites})
    kept = dict(zip(numbers, mask, strict=True))
    return [site for site in sites if kept[site.layer][site.name]]


def _fixed(sites: Sequence[Site], keep: Sequence[str]) -> list[Site]:
    for end in keep:
        if not any(_named(site.name, [end]) for site in sites):
            raise ValueError(
                f"keep names {end!r}, which matches none of the targeted linears; they are "
                f"{sorted({site.name for site in sites})}"
            )
    return [site for site in sites if _named(site.name, keep)]


def _named(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


@torch.no_grad()
def _copy_probe(folder: Path, site: Site, rows: Rows) -> None:
    """The probe's A and B, which had scale 1; B takes up what this adapter's scale differs by."""
    where = f"base_model.model.{site.path}."
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:  # type: ignore[no-untyped-call]
            a = file.get_tensor(where + "lora_A.weight")
            b = file.get_tensor(where + "lora_B.weight").T
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the probe in {folder} cannot be read: {error}") from None
    if a.shape != rows.a.shape or b.shape != rows.b.shape:
        raise ValueError(
            f"the probe has rank {len(a)}, this adapter {len(rows.a)}; set r to the probe's for init_from_probe"
        )
    rows.a.copy_(a)
    rows.b.copy_(b / rows.spans.scale[0])


METHOD = FanLoRAMethod
