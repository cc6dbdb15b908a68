"""ONNX Runtime on a CUDA device with the graphs that `build-engines` fused for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.backends.base import Backend, Network, Sampler, check_inputs
from uc3d_rt.backends.onnxruntime import OnnxRuntimeNetwork, explained, open_session
from uc3d_rt.contract import Manifest, NetworkSpec, network_specs
from uc3d_rt.engines import EngineSet, verified_engine_path
from uc3d_rt.errors import BackendError
from uc3d_rt.sampler import Step

FloatArray = NDArray[np.float32]

_PROVIDER_OPTIONS = {
    "cuda": {"cudnn_conv_algo_search": "EXHAUSTIVE", "arena_extend_strategy": "kSameAsRequested"},
    "cpu": {},
}
_STEP_OPTIONS = {"cuda": {"enable_cuda_graph": "1"}, "cpu": {}}


class OnnxRuntimeEngines(Backend):
    """Opens the engines of one folder that was built with `--backend onnxruntime`."""

    def __init__(self, folder: Path, engines: EngineSet, device: str = "cuda") -> None:
        """Take the engines of a folder; the device is another only in tests, with engines made for it."""
        self.folder = folder
        self.engines = engines
        self.device = device

    def open(self, bundle: Path, manifest: Manifest, name: str) -> Network:
        """Verify and load one network; raises as `Backend.open`."""
        spec, views = network_specs(manifest.shape)[name], manifest.shape.views
        if name == "unet":
            return StepNetwork(StepSampler(self, manifest), spec, views)
        session = self.session(name, _PROVIDER_OPTIONS[self.device])
        return OnnxRuntimeNetwork(session, spec, views, self.engines.engines[name].batches[0])

    def open_sampler(self, bundle: Path, manifest: Manifest) -> Sampler:
        """Verify and load the steps; raises as `Backend.open`."""
        return StepSampler(self, manifest)

    def session(self, part: str, provider_options: dict[str, str]) -> Any:
        """A session of one engine file."""
        return open_session(
            verified_engine_path(self.engines, self.folder, part),
            self.device,
            provider_options=provider_options,
        )


@dataclass
class _Loop:
    """One step graph, bound to go from either of two places to the other, and its condition."""

    objects: int  # 1, or 2 where guidance acts: the second sees no picture
    session: Any
    bindings: list[Any]  # from the first place, from the second
    plan: Any
    given: dict[str, Any]  # tokens and E(y)
    context: Any  # makes keys and values of the tokens
    context_binding: Any

    def set_condition(self, tokens: FloatArray, image_latent: FloatArray) -> None:
        for name, value in (("tokens", tokens), ("image_latent", image_latent)):
            both = np.concatenate([value, np.zeros_like(value)])[: self.objects]
            kind = np.float16 if name == "image_latent" else np.float32
            self.given[name].update_inplace(np.ascontiguousarray(both, kind))
        self.context.run_with_iobinding(self.context_binding)

    def run(self, at: int) -> None:
        """Go from a place to the other."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(1 + at))  # a CUDA graph for each place
        self.session.run_with_iobinding(self.bindings[at], options)


class StepSampler(Sampler):
    """All steps of an object on the device: only the start noise goes in and only z_0 comes out.

    z_t and the number of the step stand in two places each; a step reads one and writes the other.
    """

    def __init__(self, backend: OnnxRuntimeEngines, manifest: Manifest) -> None:
        self._backend, self._device = backend, backend.device
        self._rescale = manifest.sampling.guidance_rescale
        shape = manifest.shape
        self._latent = (shape.views, 2 * shape.latent_channels, shape.latent_px, shape.latent_px)
        self._condition = {
            "tokens": (shape.tokens, shape.token_dim),
            "image_latent": (shape.latent_channels, shape.latent_px, shape.latent_px),
        }
        options = _PROVIDER_OPTIONS[self._device]
        self._context = backend.session("unet_context", options)
        self._time = backend.session("unet_time", options)
        table = self._time.get_outputs()[0].shape
        self._rows = table[0]  # steps whose plan the device holds at once
        self._table = self._room(table, np.float16)
        self._given = {name: self._room((self._rows,), np.float32) for name in ("timestep", "focal")}
        self._table_binding = self._time.io_binding()
        for name, value in self._given.items():
            self._table_binding.bind_ortvalue_input(name, value)
        self._table_binding.bind_ortvalue_output("time_table", self._table)
        self._z = [self._room(self._latent, np.float32) for _ in range(2)]
        self._step = [self._room((1,), np.int64) for _ in range(2)]
        self._loops: dict[int, _Loop] = {}

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
        with explained("unet"):
            for objects in sorted({2 if step.guided else 1 for step in plan}):
                self._loop(objects).set_condition(tokens, image_latent)
            at = 0
            self._z[at].update_inplace(np.ascontiguousarray(z_T, np.float32))
            for first in range(0, len(plan), self._rows):
                part = plan[first : first + self._rows]
                self._set_plan(part, focal, guidance)
                self._step[at].update_inplace(np.zeros(1, np.int64))
                for done, step in enumerate(part, start=first + 1):
                    self._loops[2 if step.guided else 1].run(at)
                    at = 1 - at
                    if on_step is not None:
                        on_step(done, len(plan))
            z_0: FloatArray = np.array(self._z[at].numpy())  # a view of the place itself on a CPU
        return z_0

    def timed_step(self, calls: int, guided: bool) -> list[float]:
        """Milliseconds of single steps, each ended before the next begins, for benchmarks."""
        loop, times = self._loop(2 if guided else 1), []
        for _ in range(calls):
            self._step[0].update_inplace(np.zeros(1, np.int64))
            started = time.perf_counter()
            loop.run(0)
            times.append(1e3 * (time.perf_counter() - started))
        return times

    def close(self) -> None:
        """Free sessions and device memory."""
        self._loops.clear()
        self._given.clear()
        self._time = self._context = self._table = self._table_binding = None
        self._z, self._step = [], []

    def _room(self, shape: Sequence[int], kind: type) -> Any:
        """Zeros on the device."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind), self._device, 0)

    def _loop(self, objects: int) -> _Loop:
        """The step for 1 object or for 2, opened when first asked for."""
        if objects not in self._loops:
            self._loops[objects] = self._opened(objects)
        return self._loops[objects]

    def _opened(self, objects: int) -> _Loop:
        """The step for 1 object or for 2, bound to its places on the device."""
        options = _PROVIDER_OPTIONS[self._device] | _STEP_OPTIONS[self._device]
        session = self._backend.session(f"unet_step_{objects}", options)
        given = {
            "tokens": self._room((objects, *self._condition["tokens"]), np.float32),
            "image_latent": self._room((objects, *self._condition["image_latent"]), np.float16),
        }
        context = self._context.io_binding()
        context.bind_ortvalue_input("tokens", given["tokens"])
        constants = {"image_latent": given["image_latent"], "time_table": self._table}
        for output in self._context.get_outputs():
            constants[output.name] = self._room((objects, *output.shape[1:]), np.float16)
            context.bind_ortvalue_output(output.name, constants[output.name])
        plan = self._room((self._rows, 1 + objects), np.float32)
        bindings = []
        for at in range(2):
            binding = session.io_binding()
            for name, value in {"z": self._z[at], "step": self._step[at], "plan": plan, **constants}.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("z_next", self._z[1 - at])
            binding.bind_ortvalue_output("step_next", self._step[1 - at])
            bindings.append(binding)
        loop = _Loop(objects, session, bindings, plan, given, self._context, context)
        if self._device == "cuda":
            # The first runs choose algorithms and take memory, and capture a CUDA graph for either place.
            for at in (0, 1) * 3:
                self._step[at].update_inplace(np.zeros(1, np.int64))
                loop.run(at)
        return loop

    def _set_plan(self, plan: Sequence[Step], focal: float, guidance: float) -> None:
        """What time and focal length become in every step, and what a step does with z and predictions."""
        timesteps = np.zeros(self._rows, np.float32)
        timesteps[: len(plan)] = [step.t for step in plan]
        self._given["timestep"].update_inplace(timesteps)
        self._given["focal"].update_inplace(np.full(self._rows, focal, np.float32))
        self._time.run_with_iobinding(self._table_binding)
        for objects, loop in self._loops.items():
            rows = np.zeros((self._rows, 1 + objects), np.float32)
            rows[: len(plan), 0] = [step.keep for step in plan]
            shares = [1.0] if objects == 1 else [guidance, 1.0 - guidance]
            rows[: len(plan), 1:] = np.outer([step.add for step in plan], shares)
            loop.plan.update_inplace(rows)


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
