"""NeuS as published, with networks in place of our grid: what the fit is compared with (`fit.py --peers`).

Architecture, initialisation and sampling follow Wang et al., "NeuS" (2021): a signed distance network of
eight layers, a colour network of four, one learned inverse deviation.  The losses are Eq. 19 to 21 with a
mask and an eikonal term, as our fit has them.  Rays meet only the unit ball, which holds the object.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.neus.field import Field, node_coordinates
from uc3d_rt.neus.fit import check_views
from uc3d_rt.neus.rays import MARGIN_PX
from uc3d_rt.views import TARGET_CAMERAS, camera_axes, pixel_grid

FloatArray = NDArray[np.float32]
Progress = Callable[[int, int], None]

CHUNK = 65536
"""Points that the networks take at once where no gradient is kept."""


@dataclass(frozen=True)
class ReferenceOptions:
    """Settings of `fit_reference`; what NeuS names has its values, but for a thousand iterations."""

    iterations: int = 1000
    rays: int = 512  # of an iteration
    near_share: float = 0.75  # of the rays: from pixels in and near the silhouettes; the rest from all
    samples: int = 64  # of a ray, stratified
    importance_samples: int = 64  # more of them where the first ones find the surface
    importance_inv_s: float = 64.0  # inverse deviation that those are drawn with, per world unit
    width: int = 256  # of hidden layers
    layers: int = 8  # of the distance network
    skip: int = 4  # the layer that is given the encoded point again
    color_layers: int = 4
    octaves: int = 6  # of a point's encoding
    view_octaves: int = 4  # of a direction's
    start_radius: float = 0.5  # of the sphere that the distance network begins as
    inv_s_start: float = 20.0
    w_rgb: float = 1.0  # Eq. 19
    w_normal: float = 1.0  # Eq. 20
    w_mask: float = 0.5
    w_eikonal: float = 0.1
    learning_rate: float = 1e-3
    warm_up: int = 50  # iterations
    final_rate: float = 0.05  # share of the learning rate that its cosine ends at
    resolution: int = 160  # nodes along an axis that the mesh is made from
    seed: int = 0
    tf32: bool = False  # matrix products with TF32's ten bits of mantissa, on GPUs that have it

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: naming the option, its value and what it may be.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            least = (
                0 if item.name.startswith("w_") or item.name in ("warm_up", "seed", "iterations") else None
            )
            if isinstance(value, bool):
                continue
            if least is None and not value > 0:
                raise ValueError(f"ReferenceOptions.{item.name} must be > 0, got {value}")
            if least is not None and not value >= least:
                raise ValueError(f"ReferenceOptions.{item.name} must be >= {least}, got {value}")
        if not 0 < self.skip < self.layers:
            raise ValueError(f"ReferenceOptions.skip must be in [1, {self.layers - 1}], got {self.skip}")
        if self.width < 4 + 6 * self.octaves:
            raise ValueError(
                f"ReferenceOptions.width must be at least {4 + 6 * self.octaves}, got {self.width}: "
                "a layer has to hold the encoded point too"
            )
        if not self.near_share <= 1 or not self.final_rate <= 1:
            raise ValueError(
                f"ReferenceOptions.near_share and final_rate must be at most 1, got {self.near_share} and "
                f"{self.final_rate}"
            )


@dataclass(frozen=True)
class ReferenceFit:
    """What `fit_reference` found."""

    field: Field  # the distance on nodes; its colours are not filled
    mesh: trimesh.Trimesh  # with the distance network's gradients as vertex normals
    inv_s: float  # learned, per world unit
    iterations: int
    fit_s: float
    mesh_s: float  # nodes, marching cubes and normals


def encoded(x: Tensor, octaves: int) -> Tensor:
    """Vectors (..., 3) and their sines and cosines at `octaves` frequencies (..., 3 + 6 * octaves)."""
    scales = 2.0 ** torch.arange(octaves, device=x.device, dtype=x.dtype)
    angles = (x[..., None, :] * scales[:, None]).flatten(-2)
    return torch.cat([x, torch.sin(angles), torch.cos(angles)], dim=-1)


class DistanceNetwork(nn.Module):
    """Signed distance and a feature vector at points of the unit ball; at first that of a sphere."""

    def __init__(self, options: ReferenceOptions) -> None:
        super().__init__()
        self.octaves, self.skip = options.octaves, options.skip
        inputs = 3 + 6 * options.octaves
        sizes = [inputs] + [options.width] * options.layers + [1 + options.width]
        self.linears = nn.ModuleList()
        for layer, (size, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            # The layer before the skip leaves room for the encoded point.
            linear = nn.Linear(size, out - inputs if layer + 1 == options.skip else out)
            self.linears.append(linear)
            self._begin_as_sphere(linear, layer, layer + 1 == len(sizes) - 1, options)
        self.linears = nn.ModuleList(weight_norm(linear) for linear in self.linears)

    def _begin_as_sphere(self, linear: nn.Linear, layer: int, last: bool, options: ReferenceOptions) -> None:
        """Geometric initialisation (Atzmon and Lipman, 2020): random layers whose output grows as |x|."""
        with torch.no_grad():
            if last:
                linear.weight.normal_(math.sqrt(math.pi / linear.in_features), 1e-4)
                linear.bias.fill_(-options.start_radius)
                return
            linear.weight.normal_(0.0, math.sqrt(2.0 / linear.out_features))
            linear.bias.zero_()
            if layer in (0, options.skip):  # at first the network knows of the point itself alone
                linear.weight[:, linear.in_features - 6 * options.octaves :] = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (N,) and features (N, width) at points (N, 3)."""
        point = encoded(x, self.octaves)
        h = point
        for layer, linear in enumerate(self.linears):
            if layer == self.skip:
                h = torch.cat([h, point], dim=-1) / math.sqrt(2.0)
            h = linear(h)
            if layer + 1 < len(self.linears):
                h = F.softplus(h, beta=100.0)
        return h[:, 0], h[:, 1:]

    def with_gradient(self, x: Tensor, keep_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Distance (N,), its gradient (N, 3), and features (N, width) at points (N, 3)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            distance, features = self(x)
            (gradient,) = torch.autograd.grad(distance.sum(), x, create_graph=keep_graph)
        return distance, gradient, features


class ColorNetwork(nn.Module):
    """Colour in [0, 1] of a surface point from its place, normal, viewing direction and features."""

    def __init__(self, options: ReferenceOptions) -> None:
        super().__init__()
        self.view_octaves = options.view_octaves
        inputs = 6 + 3 + 6 * options.view_octaves + options.width
        sizes = [inputs] + [options.width] * options.color_layers + [3]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.linears = nn.ModuleList(weight_norm(nn.Linear(size, out)) for size, out in pairs)

    def forward(self, x: Tensor, gradient: Tensor, direction: Tensor, features: Tensor) -> Tensor:
        """Colours (N, 3)."""
        h = torch.cat([x, gradient, encoded(direction, self.view_octaves), features], dim=-1)
        for linear in self.linears[:-1]:
            h = torch.relu(linear(h))
        return torch.sigmoid(self.linears[-1](h))


class ReferenceModel(nn.Module):
    """Both networks and the inverse deviation."""

    def __init__(self, options: ReferenceOptions) -> None:
        super().__init__()
        self.distance = DistanceNetwork(options)
        self.color = ColorNetwork(options)
        # A tenth of the logarithm, as in NeuS: small steps of Adam then suffice to sharpen the surface.
        self.sharpness = nn.Parameter(torch.tensor(0.1 * math.log(options.inv_s_start)))

    @property
    def inv_s(self) -> Tensor:
        """Inverse deviation of the logistic density, per world unit."""
        return torch.exp(10.0 * self.sharpness)


def section_weights(before: Tensor, after: Tensor, inv_s: Tensor | float) -> Tensor:
    """Weight (N, S) of each section of a ray from the distances (N, S) at its two ends.

    NeuS Eq. 11 to 13: alpha = max((Phi(f_i) - Phi(f_i+1)) / Phi(f_i), 0) and w = T alpha with
    T = prod(1 - alpha), all as logarithms: deep inside of an object Phi itself is no float32.
    """
    passed = F.logsigmoid(inv_s * after) - F.logsigmoid(inv_s * before)  # log(1 - alpha)
    passed = passed.clamp(max=0.0)  # a ray that leaves the object meets nothing new
    log_light = torch.cumsum(passed, dim=-1) - passed
    return torch.exp(log_light) * -torch.expm1(passed)


@dataclass(frozen=True)
class Rendered:
    """What N rays show."""

    color: Tensor  # (N, 3) over white
    normal: Tensor  # (N, 3) weighted sum of the distance's gradients
    opacity: Tensor  # (N,)
    eikonal: Tensor  # () mean of (|gradient| - 1)²


def render(model: ReferenceModel, origin: Tensor, direction: Tensor, t: Tensor) -> Rendered:
    """Render rays through the networks, which are asked at the middle of every section.

    Args:
        model: the networks.
        origin: (N, 3).
        direction: (N, 3), unit length.
        t: (N, S + 1) ends of the sections, ascending.
    """
    size, middle = torch.diff(t), 0.5 * (t[:, :-1] + t[:, 1:])
    x = (origin[:, None] + middle[..., None] * direction[:, None]).reshape(-1, 3)
    along = direction[:, None].expand(-1, size.shape[1], -1).reshape(-1, 3)
    distance, gradient, features = model.distance.with_gradient(x, keep_graph=torch.is_grad_enabled())
    color = model.color(x, gradient, along, features)
    slope = (gradient * along).sum(-1)
    half = (0.5 * slope * size.reshape(-1)).reshape(size.shape)
    distance = distance.reshape(size.shape)
    weight = section_weights(distance - half, distance + half, model.inv_s)[..., None]
    opacity = weight.sum(dim=(1, 2))
    shape = (*size.shape, 3)
    return Rendered(
        color=(weight * color.reshape(shape)).sum(1) + (1.0 - opacity)[:, None],
        normal=(weight * gradient.reshape(shape)).sum(1),
        opacity=opacity,
        eikonal=((torch.linalg.vector_norm(gradient, dim=-1) - 1.0) ** 2).mean(),
    )


def sample_ends(
    model: ReferenceModel,
    origin: Tensor,
    direction: Tensor,
    options: ReferenceOptions,
    generator: torch.Generator,
) -> Tensor:
    """Ends (N, samples + importance_samples) of the sections of rays (N, 3), within the unit ball."""
    count, device = len(origin), origin.device
    half = torch.sqrt((1.0 - (origin * origin).sum(-1, keepdim=True)).clamp(min=0.0))
    jitter = torch.rand((count, options.samples), device=device, generator=generator)
    steps = (torch.arange(options.samples, device=device) + jitter) / options.samples
    t = half * (2.0 * steps - 1.0)
    with torch.no_grad():
        x = origin[:, None] + t[..., None] * direction[:, None]
        distance = model.distance(x.reshape(-1, 3))[0].reshape(t.shape)
        weight = section_weights(distance[:, :-1], distance[:, 1:], options.importance_inv_s) + 1e-5
        share = torch.cumsum(weight, dim=-1)
        share = torch.cat([torch.zeros_like(share[:, :1]), share / share[:, -1:]], dim=-1)
        jitter = torch.rand((count, options.importance_samples), device=device, generator=generator)
        wanted = (
            torch.arange(options.importance_samples, device=device) + jitter
        ) / options.importance_samples
        at = torch.searchsorted(share, wanted.contiguous(), right=True).clamp(1, options.samples - 1)
        low, high = share.gather(1, at - 1), share.gather(1, at)
        part = ((wanted - low) / (high - low).clamp(min=1e-9)).clamp(0.0, 1.0)
        more = torch.lerp(t.gather(1, at - 1), t.gather(1, at), part)
    return torch.sort(torch.cat([t, more], dim=-1), dim=-1).values


@dataclass(frozen=True)
class TargetRays:
    """P pixels of the six views whose rays meet the unit ball, and what they show."""

    origin: Tensor  # (P, 3), on the plane through the world origin
    direction: Tensor  # (P, 3)
    color: Tensor  # (P, 3)
    normal: Tensor  # (P, 3), zero = background
    mask: Tensor  # (P,)
    near: Tensor  # (Q,) which of them are in or near a silhouette


def target_rays(
    color: FloatArray, normal: FloatArray, masks: NDArray[np.bool_], device: torch.device
) -> TargetRays:
    """The pixels of six views (6, H, H, 3) on a device."""
    from scipy.ndimage import distance_transform_edt

    size = masks.shape[-1]
    u, v = pixel_grid(size)
    met = u * u + v * v < 1.0
    origins, directions, near = [], [], []
    for mask, camera in zip(masks, TARGET_CAMERAS, strict=True):
        right, up, back = camera_axes(camera)
        origins.append(u[met][:, None] * right + v[met][:, None] * up)
        directions.append(np.broadcast_to(-back, origins[-1].shape))
        outside = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
        near.append(outside[met] <= MARGIN_PX * size / 256.0)

    def moved(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return TargetRays(
        origin=moved(np.concatenate(origins)),
        direction=moved(np.concatenate(directions)),
        color=moved(color[:, met].reshape(-1, 3)),
        normal=moved(normal[:, met].reshape(-1, 3)),
        mask=moved(masks[:, met].reshape(-1).astype(np.float32)),
        near=moved(np.flatnonzero(np.concatenate(near))),
    )


def loss_of(shown: Rendered, rays: TargetRays, chosen: Tensor, options: ReferenceOptions) -> Tensor:
    """Eq. 21 with the mask and the eikonal term, of rendered rays; `chosen` (N,) says which they are."""
    mask = rays.mask[chosen]
    rgb = ((shown.color - rays.color[chosen]) ** 2).sum(-1).mean()  # Eq. 19
    cosine = F.cosine_similarity(shown.normal, rays.normal[chosen], dim=-1, eps=1e-6)
    normal = ((1.0 - cosine) * mask).sum() / mask.sum().clamp(min=1.0)  # Eq. 20, where a normal is shown
    silhouette = F.binary_cross_entropy(shown.opacity.clamp(1e-3, 1.0 - 1e-3), mask)
    return (
        options.w_rgb * rgb
        + options.w_normal * normal
        + options.w_mask * silhouette
        + options.w_eikonal * shown.eikonal
    )


def rate_at(iteration: int, options: ReferenceOptions) -> float:
    """Share of the learning rate in an iteration, from 0: a ramp, then a cosine."""
    if iteration < options.warm_up:
        return (iteration + 1) / options.warm_up
    progress = (iteration - options.warm_up) / max(options.iterations - options.warm_up, 1)
    return options.final_rate + (1.0 - options.final_rate) * 0.5 * (1.0 + math.cos(math.pi * progress))


@contextlib.contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    """TF32 in matrix products or not; the process' setting comes back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def fit_reference(
    color: FloatArray,
    normal: FloatArray,
    options: ReferenceOptions | None = None,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> ReferenceFit:
    """Fit the networks to six views and make a mesh of what they hold.

    Args:
        color: (6, H, H, 3) in [0, 1], white background; the views of `uc3d_rt.views.TARGET_CAMERAS`.
        normal: (6, H, H, 3) unit world normals, zero = background.
        options: settings; None = `ReferenceOptions()`.
        device: `cpu`, `cuda`, or a GPU of PyTorch.
        on_progress: called with (iterations done, iterations in all).

    Raises:
        FitError: the views have wrong shapes or values, or the networks hold no closed surface.
    """
    options, device = options or ReferenceOptions(), torch.device(device)
    color, normal, masks = check_views(color, normal)
    with _precision(options.tf32), torch.random.fork_rng([device] if device.type == "cuda" else []):
        started = time.perf_counter()
        model = trained(color, normal, masks, options, device, on_progress)
        inv_s = float(model.inv_s.detach())  # waits for the device
        fitted = time.perf_counter()
        field = sampled_field(model.distance, options.resolution, device)
        mesh = mesh_of(field, model.distance, device)
        return ReferenceFit(
            field, mesh, inv_s, options.iterations, fitted - started, time.perf_counter() - fitted
        )


def trained(
    color: FloatArray,
    normal: FloatArray,
    masks: NDArray[np.bool_],
    options: ReferenceOptions,
    device: torch.device,
    on_progress: Progress | None = None,
) -> ReferenceModel:
    """Networks fitted to six views (6, H, H, 3) and their silhouettes (6, H, H)."""
    torch.manual_seed(options.seed)
    model = ReferenceModel(options).to(device)
    generator = torch.Generator(device).manual_seed(options.seed)
    rays = target_rays(color, normal, masks, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    near = round(options.near_share * options.rays)
    for iteration in range(options.iterations):
        chosen = torch.cat(
            [
                rays.near[torch.randint(len(rays.near), (near,), device=device, generator=generator)],
                torch.randint(len(rays.mask), (options.rays - near,), device=device, generator=generator),
            ]
        )
        origin, direction = rays.origin[chosen], rays.direction[chosen]
        t = sample_ends(model, origin, direction, options, generator)
        loss = loss_of(render(model, origin, direction, t), rays, chosen, options)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_at(iteration, options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_progress is not None:
            on_progress(iteration + 1, options.iterations)
    return model


@torch.no_grad()
def sampled_field(network: DistanceNetwork, resolution: int, device: torch.device) -> Field:
    """The distance on R³ nodes; outside of the unit ball, which no ray meets, that to the ball."""
    axis = node_coordinates(resolution)
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    sdf = np.sqrt((points * points).sum(-1)) - np.float32(1.0)
    inside = np.flatnonzero(sdf < 0.0)
    for part in np.array_split(inside, -(-len(inside) // CHUNK)):
        found = network(torch.from_numpy(points[part]).to(device))[0].cpu().numpy()
        sdf[part] = np.maximum(found, sdf[part])
    shape = (resolution,) * 3
    return Field(sdf.reshape(shape), np.zeros((*shape, 3), np.float32))


def mesh_of(field: Field, network: DistanceNetwork, device: torch.device) -> trimesh.Trimesh:
    """Surface of a field without stray parts, its vertex normals the network's gradients.

    Raises:
        FitError: the field has no inside, or its surface cannot be closed.
    """
    surface = extract_surface(field, 0.05)  # parts as small as `MeshOptions` drops
    normals = []
    for part in np.array_split(surface.vertices, -(-len(surface.vertices) // CHUNK)):
        at = torch.from_numpy(np.ascontiguousarray(part)).to(device)
        gradient = network.with_gradient(at, keep_graph=False)[1]
        normals.append(F.normalize(gradient, dim=-1).detach().cpu().numpy())
    return trimesh.Trimesh(
        surface.vertices, surface.faces, vertex_normals=np.concatenate(normals), process=False
    )
