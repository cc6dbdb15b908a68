"""ONNX Runtime on a CUDA device with the graphs that `build-engines` fused for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.backends.base import Backend, Network, Place, Sampler, check_inputs
from uc3d_rt.backends.onnxruntime import OnnxRuntimeNetwork, explained, open_session, provider_options
from uc3d_rt.contract import Manifest, NetworkSpec, network_specs
from uc3d_rt.engines import EngineSet, verified_engine_path
from uc3d_rt.errors import BackendError
from uc3d_rt.ladder import LowMemory, rung_of
from uc3d_rt.sampler import Step

FloatArray = NDArray[np.float32]

# Trying all algorithms finds none that are faster, takes seconds, and chooses anew in each process.
_PROVIDER_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
_CAPTURE = {"enable_cuda_graph": "1"}


class OnnxRuntimeEngines(Backend):
    """Opens the engines of one folder that was built with `--backend onnxruntime`."""

    def __init__(
        self, folder: Path, engines: EngineSet, device: str = "cuda", low_memory: LowMemory = False
    ) -> None:
        """Take the engines of a folder; the device is another only in tests, with engines made for it."""
        self.low_memory = rung_of(low_memory)
        self.folder = folder
        self.engines = engines
        self.device = device
        self.place = Place.named(device)

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """Verify and load one network; raises as `Backend.open`."""
        spec, views = network_specs(manifest.shape)[name], manifest.shape.views
        if name == "unet":
            return StepNetwork(StepSampler(self, manifest), spec, views)
        return OnnxRuntimeNetwork(self.session(name), spec, views, self.engines.engines[name].batches[0])

    def open_sampler(self, bundle: Path, manifest: Manifest) -> Sampler:
        """Verify and load the steps; raises as `Backend.open`."""
        return StepSampler(self, manifest)

    @property
    def captures(self) -> bool:
        """Whether steps become CUDA graphs."""
        return self.place.kind == "cuda"

    def session(self, part: str, in_steps: bool = False) -> Any:
        """A session of one engine file; of one that runs in every step if asked for."""
        usual = _PROVIDER_OPTIONS | (_CAPTURE if in_steps and self.captures else {})
        return open_session(
            verified_engine_path(self.engines, self.folder, part),
            self.device,
            provider_options=provider_options(self.device, usual, self.low_memory),
            deterministic=self.engines.deterministic,
            low_memory=self.low_memory,
        )


@dataclass(frozen=True)
class _Run:
    """A graph bound to its places on the device; on CUDA it is captured as a CUDA graph with a number."""

    session: Any
    binding: Any
    number: int

    def __call__(self) -> None:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self.number))
        with explained("unet"):
            self.session.run_with_iobinding(self.binding, options)


@dataclass(frozen=True)
class _Loop:
    """A step from either of two places to the other."""

    predictions: int  # 1, or 2 where guidance acts: the second sees no picture
    plan: Any
    runs: tuple[tuple[_Run, ...], ...]  # from the first place, from the second: one after the other

    def run(self, at: int) -> None:
        """Go from a place to the other."""
        for run in self.runs[at]:
            run()


@dataclass(frozen=True)
class _Condition:
    """What objects of a call know of the picture."""

    given: dict[str, Any]  # tokens and E(y)
    context: dict[str, Any]  # keys and values of the tokens


Sees = tuple[bool, ...]
"""Which objects of a call see the picture."""


class StepSampler(Sampler):
    """All steps of an object on the device: only the start noise goes in and only z_0 comes out.

    z_t and the number of the step stand in two places each; a step reads one and writes the other.
    What the backend's rung of low memory asks for: what makes time and keys is loaded only while it runs;
    then a step with guidance is two calls for one object and a sum.  CUDA graphs are captured on every rung:
    without them the `edge` steps took 138 MiB more on an H100.
    """

    def __init__(self, backend: OnnxRuntimeEngines, manifest: Manifest) -> None:
        self._backend, self._place, self._low_memory = backend, backend.place, backend.low_memory
        self._sessions: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}  # of CUDA graphs, a part
        self._conditions: dict[Sees, _Condition] = {}
        self._loops: dict[int, _Loop] = {}
        self._rescale = manifest.sampling.guidance_rescale
        shape = manifest.shape
        self._latent = (shape.views, 2 * shape.latent_channels, shape.latent_px, shape.latent_px)
        self._condition = {
            "tokens": (shape.tokens, shape.token_dim),
            "image_latent": (shape.latent_channels, shape.latent_px, shape.latent_px),
        }
        with self._session("unet_time") as session:
            table = session.get_outputs()[0].shape
        self._rows = table[0]  # steps whose plan the device holds at once
        with explained("unet"):
            self._table = self._room(table, np.float16)
            self._given = {name: self._room((self._rows,), np.float32) for name in ("timestep", "focal")}
            self._z = [self._room(self._latent, np.float32) for _ in range(2)]
            self._step = [self._room((1,), np.int64) for _ in range(2)]

    def __call__(
        self,
        tokens: FloatArray,
        image_latent: FloatArray,
        focal: float,
        z_T: FloatArray,
        plan: Sequence[Step],
        *,
        guidance: float,
        guidance_rescale: float = 0.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> FloatArray:
        """Run all steps; see `Sampler`."""
        if guidance_rescale != self._rescale and any(step.guided for step in plan):
            raise BackendError(
                f"these engines hold a guidance rescaling of {self._rescale:g}, not {guidance_rescale:g}; "
                "export the bundle with it and build them again"
            )
        kinds = sorted({2 if step.guided else 1 for step in plan})
        with explained("unet"):
            self._set_conditions(kinds, tokens, image_latent)
            self._set_times(plan[: self._rows], focal)
            for kind in kinds:
                self._loop(kind)
            at = 0
            self._z[at].update_inplace(np.ascontiguousarray(z_T, np.float32))
        for first in range(0, len(plan), self._rows):
            part = plan[first : first + self._rows]
            with explained("unet"):
                if first:
                    self._set_times(part, focal)
                self._set_shares(part, guidance)
                self._step[at].update_inplace(np.zeros(1, np.int64))
            for done, step in enumerate(part, start=first + 1):
                self._loops[2 if step.guided else 1].run(at)
                at = 1 - at
                if on_step is not None:
                    on_step(done, len(plan))
        with explained("unet"):
            z_0: FloatArray = np.array(self._z[at].numpy())  # a view of the place itself on a CPU
        return z_0

    def timed_step(self, calls: int, guided: bool) -> list[float]:
        """Milliseconds of single steps, each ended before the next begins, for benchmarks."""
        kind = 2 if guided else 1
        if kind not in self._loops:
            tokens, latent = (np.zeros((1, *size), np.float32) for size in self._condition.values())
            self._set_conditions([kind], tokens, latent)
        loop, times = self._loop(kind), []
        for _ in range(calls):
            self._step[0].update_inplace(np.zeros(1, np.int64))
            started = time.perf_counter()
            loop.run(0)
            times.append(1e3 * (time.perf_counter() - started))
        return times

    def close(self) -> None:
        """Free sessions and device memory."""
        self._loops.clear()
        self._sessions.clear()
        self._conditions.clear()
        self._given.clear()
        self._table = None
        self._z, self._step = [], []

    def _room(self, shape: Sequence[int], kind: type) -> Any:
        """Zeros on the device."""
        import onnxruntime

        place = self._place
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind), place.kind, place.ordinal)

    @contextmanager
    def _session(self, part: str) -> Iterator[Any]:
        """What makes time or keys and values: freed at once where memory is low, else kept."""
        session = self._sessions.get(part)
        if session is None:
            session = self._backend.session(part)
        if not self._low_memory.frees_stages:
            self._sessions[part] = session
        yield session

    def _step_session(self, part: str) -> Any:
        """One that runs in every step."""
        if part not in self._sessions:
            self._sessions[part] = self._backend.session(part, in_steps=True)
        return self._sessions[part]

    def _sees(self, kind: int) -> tuple[Sees, ...]:
        """The calls that a step without guidance (1) or with it (2) is made of."""
        if kind == 1:
            return ((True,),)
        return ((True,), (False,)) if self._low_memory.one_object else ((True, False),)

    def _set_conditions(self, kinds: Sequence[int], tokens: FloatArray, image_latent: FloatArray) -> None:
        """Take a picture to the device, and make keys and values of it."""
        with self._session("unet_context") as session:
            for sees in dict.fromkeys(sees for kind in kinds for sees in self._sees(kind)):
                if sees not in self._conditions:
                    self._conditions[sees] = _Condition(
                        {
                            "tokens": self._room((len(sees), *self._condition["tokens"]), np.float32),
                            "image_latent": self._room(
                                (len(sees), *self._condition["image_latent"]), np.float16
                            ),
                        },
                        {
                            output.name: self._room((len(sees), *output.shape[1:]), np.float16)
                            for output in session.get_outputs()
                        },
                    )
                condition = self._conditions[sees]
                for name, value in (("tokens", tokens), ("image_latent", image_latent)):
                    rows = np.concatenate([value if seen else np.zeros_like(value) for seen in sees])
                    kind = np.float16 if name == "image_latent" else np.float32
                    condition.given[name].update_inplace(np.ascontiguousarray(rows, kind))
                given = {"tokens": condition.given["tokens"]}
                session.run_with_iobinding(_bound(session, given, condition.context))

    def _loop(self, kind: int) -> _Loop:
        """The step without guidance (1) or with it (2), opened when first asked for."""
        if kind not in self._loops:
            plan = self._room((self._rows, 1 + kind), np.float32)
            split = kind == 2 and self._low_memory.one_object
            runs = self._split_runs(plan) if split else self._runs(kind, plan)
            loop = self._loops[kind] = _Loop(kind, plan, runs)
            if self._backend.captures:
                # The first runs choose algorithms, take memory, and capture a CUDA graph for either place.
                for at in (0, 1) * 3:
                    self._step[at].update_inplace(np.zeros(1, np.int64))
                    loop.run(at)
        return self._loops[kind]

    def _runs(self, kind: int, plan: Any) -> tuple[tuple[_Run, ...], ...]:
        """One graph a step."""
        (sees,) = self._sees(kind)
        return tuple(
            (self._call(sees, plan, at, {"z_next": self._z[1 - at], "step_next": self._step[1 - at]}),)
            for at in range(2)
        )

    def _split_runs(self, plan: Any) -> tuple[tuple[_Run, ...], ...]:
        """Two predictions, one after the other, and what guidance makes of them."""
        alone = self._room((self._rows, 2), np.float32)
        alone.update_inplace(np.tile(np.array([0.0, 1.0], np.float32), (self._rows, 1)))  # nothing of z
        made = {name: self._room(self._latent, np.float32) for name in ("conditional", "unconditional")}
        nowhere = self._room((1,), np.int64)
        runs = []
        for at in range(2):
            calls = [
                self._call(sees, alone, at, {"z_next": room, "step_next": nowhere})
                for sees, room in zip(self._sees(2), made.values(), strict=True)
            ]
            inputs = {"z": self._z[at], "step": self._step[at], "plan": plan, **made}
            outputs = {"z_next": self._z[1 - at], "step_next": self._step[1 - at]}
            runs.append((*calls, self._run("unet_guidance", inputs, outputs)))
        return tuple(runs)

    def _call(self, sees: Sees, plan: Any, at: int, outputs: dict[str, Any]) -> _Run:
        """A step graph for these objects, from a place."""
        condition = self._conditions[sees]
        inputs = {
            "z": self._z[at], "step": self._step[at], "plan": plan, "time_table": self._table,
            "image_latent": condition.given["image_latent"], **condition.context,
        }  # fmt: skip
        return self._run(f"unet_step_{len(sees)}", inputs, outputs)

    def _run(self, part: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> _Run:
        session = self._step_session(part)
        number = self._numbers[part] = self._numbers.get(part, 0) + 1
        return _Run(session, _bound(session, inputs, outputs), number)

    def _set_times(self, plan: Sequence[Step], focal: float) -> None:
        """What time and focal length become in every step."""
        timesteps = np.zeros(self._rows, np.float32)
        timesteps[: len(plan)] = [step.t for step in plan]
        self._given["timestep"].update_inplace(timesteps)
        self._given["focal"].update_inplace(np.full(self._rows, focal, np.float32))
        with self._session("unet_time") as session:
            session.run_with_iobinding(_bound(session, self._given, {"time_table": self._table}))

    def _set_shares(self, plan: Sequence[Step], guidance: float) -> None:
        """What every step does with z and predictions."""
        for loop in self._loops.values():
            rows = np.zeros((self._rows, 1 + loop.predictions), np.float32)
            rows[: len(plan), 0] = [step.keep for step in plan]
            shares = [1.0] if loop.predictions == 1 else [guidance, 1.0 - guidance]
            rows[: len(plan), 1:] = np.outer([step.add for step in plan], shares)
            loop.plan.update_inplace(rows)


def _bound(session: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
    """A binding of places on the device."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return binding


class StepNetwork(Network):
    """The UNet alone, as the contract has it: one step per object that keeps nothing of z."""

    def __init__(self, sampler: StepSampler, spec: NetworkSpec, views: int) -> None:
        self._sampler, self._spec, self._views = sampler, spec, views

    def __call__(self, **inputs: FloatArray) -> dict[str, FloatArray]:
        """Run once; raises as `Network.__call__`."""
        check_inputs(self._spec, inputs, self._views)
        found = []
        for index, timestep in enumerate(inputs["timestep"]):
            one = slice(index, index + 1)
            only = Step(round(float(timestep)), guided=False, keep=0.0, add=1.0)
            sample = inputs["sample"][index * self._views : (index + 1) * self._views]
            found.append(
                self._sampler(
                    inputs["tokens"][one], inputs["image_latent"][one], float(inputs["focal"][index]), sample,
                    [only], guidance=1.0,
                )
            )  # fmt: skip
        return {"prediction": np.concatenate(found)}

    def close(self) -> None:
        """Free the steps."""
        self._sampler.close()
