"""PatchGAN and its losses against a restatement in torch.nn layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from latent_diffusion.nets.discriminator import NORMS, PatchGAN
from latent_diffusion.nets.losses import adversarial

nn, F = torch.nn, torch.nn.functional
WIDTH, CHANNELS = 4, 5  # conditional: five input channels


class TorchActNorm(nn.Module):
    """After its first training batch y = scale · (x + loc), both parameters set by that batch."""

    def __init__(self, width):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))
        self.fresh = True

    def forward(self, x):
        if self.fresh and self.training:
            self.fresh = False
            mean = x.detach().mean((0, 2, 3), keepdim=True)
            std = x.detach().std((0, 2, 3), keepdim=True, correction=0)
            self.loc.data, self.scale.data = -mean, 1 / (std + 1e-6)
        return self.scale * (x + self.loc)


def torch_patchgan(num_layers, norm):
    make_norm = {"batch": nn.BatchNorm2d, "actnorm": TorchActNorm}[norm]
    layers = [nn.Conv2d(CHANNELS, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2)]
    width = WIDTH
    for n in range(1, num_layers + 1):
        wider, stride = WIDTH * min(2**n, 8), 2 if n < num_layers else 1
        layers += [
            nn.Conv2d(width, wider, 4, stride, 1, bias=norm == "actnorm"),
            make_norm(wider),
            nn.LeakyReLU(0.2),
        ]
        width = wider
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


def kernel(weight):
    return weight.detach().numpy().transpose(2, 3, 1, 0)


def from_torch(net, num_layers, of=lambda p: p):
    """Our parameters by the table in PatchGAN's docstring; `of` takes .grad for gradients."""
    table = {"conv_in": 0, "conv_out": 3 * num_layers + 2}
    for n in range(1, num_layers + 1):
        table |= {f"conv{n}": 3 * n - 1, f"norm{n}": 3 * n}
    params = {}
    for name, index in table.items():
        layer = net[index]
        if isinstance(layer, nn.Conv2d):
            params[name] = {"kernel": kernel(of(layer.weight))}
            if layer.bias is not None:
                params[name]["bias"] = of(layer.bias).detach().numpy()
        elif isinstance(layer, nn.BatchNorm2d):
            params[name] = {
                "scale": of(layer.weight).detach().numpy(),
                "bias": of(layer.bias).detach().numpy(),
            }
    return params


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_forward_gradient_and_statistics_equal_torch(num_layers, norm):
    torch.manual_seed(0)
    theirs = torch_patchgan(num_layers, norm)
    ours = PatchGAN(WIDTH, num_layers, norm)
    size = 3 * 2**num_layers + 2
    x = np.random.default_rng(0).normal(size=(2, size, size, CHANNELS)).astype(np.float32)
    variables = jax.eval_shape(ours.init, jax.random.key(0), x)
    stats = {
        name: {key: jnp.full(leaf.shape, float(key in ("var", "gain"))) for key, leaf in s.items()}
        for name, s in variables["batch_stats"].items()
    }
    params = from_torch(theirs, num_layers)
    if norm == "actnorm":
        for name, s in stats.items():
            params[name] = {"loc": 0 * s["offset"], "scale": s["gain"]}

    x_torch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    logits_torch = theirs.train()(x_torch)
    logits_torch.square().sum().backward()

    @jax.jit
    def train(params, x):
        def loss(params, x):
            logits, moved = ours.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.square(logits).sum(), (logits, moved["batch_stats"])

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (to_params, to_x), (logits, stats) = train(params, x)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1e-3, np.abs(b).max()))

    close(logits, logits_torch.detach().numpy().transpose(0, 2, 3, 1))
    close(to_x, x_torch.grad.numpy().transpose(0, 2, 3, 1))
    expected = from_torch(theirs, num_layers, of=lambda p: p.grad)
    jax.tree.map(close, {name: to_params[name] for name in expected}, expected)

    for n in range(1, num_layers + 1):
        layer, own = theirs[3 * n], stats[f"norm{n}"]
        if norm == "batch":  # torch keeps the unbiased variance
            close(own["mean"], layer.running_mean.numpy())
            rows = _norm_input_side(size, num_layers, n) ** 2 * len(x)
            unbiased = 0.9 + (own["var"] - 0.9) * rows / (rows - 1)
            close(unbiased, layer.running_var.numpy())
        else:
            close(own["offset"], layer.loc.detach().numpy().ravel())
            close(own["gain"], layer.scale.detach().numpy().ravel())
            assert own["initialized"] == 1

    if norm == "batch":  # evaluation, from torch's statistics
        stats = {
            f"norm{n}": {
                "mean": theirs[3 * n].running_mean.numpy(),
                "var": theirs[3 * n].running_var.numpy(),
            }
            for n in range(1, num_layers + 1)
        }
    logits = jax.jit(ours.apply)({"params": params, "batch_stats": stats}, x)
    close(logits, theirs.eval()(x_torch).detach().numpy().transpose(0, 2, 3, 1))


def _norm_input_side(size, num_layers, n):
    return size // 2 ** (n + 1) if n < num_layers else size // 2**num_layers - 1


def test_losses_equal_torch():
    real, fake = np.random.default_rng(0).normal(0, 2, (2, 3, 4, 4, 1)).astype(np.float32)
    t_real, t_fake = torch.from_numpy(real), torch.from_numpy(fake)
    hinge = 0.5 * (F.relu(1 - t_real).mean() + F.relu(1 + t_fake).mean())
    bce = F.binary_cross_entropy_with_logits
    vanilla = 0.5 * (bce(t_real, torch.ones_like(t_real)) + bce(t_fake, torch.zeros_like(t_fake)))
    real, fake = jnp.asarray(real), jnp.asarray(fake)
    np.testing.assert_allclose(adversarial.hinge_d_loss(real, fake), hinge, rtol=1e-6)
    np.testing.assert_allclose(adversarial.vanilla_d_loss(real, fake), vanilla, rtol=1e-6)
