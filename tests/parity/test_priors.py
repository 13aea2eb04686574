"""Priors against taming-transformers' own code and diffusers' masked scheduler: the same codes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prior import CODES, FRONT, made

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
if not hasattr(transformers, "top_k_top_p_filtering"):  # today's versions have lost it
    transformers.top_k_top_p_filtering = None
mingpt = pytest.importorskip("taming.modules.transformer.mingpt")

from diffusers.schedulers import scheduling_amused
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from latent_diffusion.convert.bundle import flat
from latent_diffusion.convert.tables import write_tensors
from latent_diffusion.convert.taming import TABLE
from latent_diffusion.core.types import Conditioning
from latent_diffusion.files.tensor import in_memory
from latent_diffusion.models.prior import Prior
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.prior import CodeTransformer
from latent_diffusion.process import decoding
from latent_diffusion.process.plan import plan_prior


def theirs_of(module, params):
    """mingpt's GPT with the parameters of one of our transformers."""
    sizes = (module.depth, module.num_heads, module.width)
    gpt = mingpt.GPT(module.vocab_size, module.max_length, *sizes)
    tensors = write_tensors(TABLE, {path: in_memory(leaf) for path, leaf in flat(params).items()})
    state = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in tensors.items()}
    missing, unexpected = gpt.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("attn.mask") for name in missing)
    return gpt.eval()


def test_logits_equal_mingpt():
    module, params, told, apply = made()
    sequence = torch.from_numpy(np.concatenate([FRONT, CODES[:, :-1]], 1)).long()
    with torch.no_grad():
        theirs, _ = theirs_of(module, params)(sequence)
    np.testing.assert_allclose(apply(CODES, told), theirs[:, 1:], atol=1e-5)


def random_prior(side, codes=97, width=64, front=1, seed=0):
    """A prior over grids of side × side codes, two blocks deep."""
    length = side * side
    module = CodeTransformer(codes, codes, front + length, width, 2, 4)
    one = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), one, Conditioning(tokens=one))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    params["params"]["pos_emb"] *= 20  # else one code would follow itself for ever
    return Prior({"transformer": params["params"]}, module, make_conditioner({}))


@pytest.mark.parametrize("guided", [False, True])
def test_256_greedy_codes_are_mingpts(guided):
    prior = random_prior(16)
    keys = jax.random.split(jax.random.key(0), 2)
    told = Conditioning(tokens=jnp.array([[5], [96]]))
    options = plan_prior({}, {"temperature": 0.0, "guidance_scale": 2.0 if guided else 1.0}, True)
    draw = jax.jit(lambda prior: prior.sample(keys, told, told, (16, 16), 16, options))
    gpt = theirs_of(prior.transformer, prior.params["transformer"])
    sequence = torch.tensor([[5], [96]])
    with torch.no_grad():
        theirs = mingpt.sample_with_past(sequence, gpt, 256, sample_logits=False)
    np.testing.assert_array_equal(draw(prior).reshape(2, 256), theirs)
    assert len(np.unique(theirs.numpy())) > 20


def test_windows_are_those_of_tamings_script():
    """A picture twice as wide as the window of 4 × 4, beside a literal loop over mingpt."""
    prior = random_prior(4, front=16)
    maps = np.random.default_rng(1).integers(0, 97, (1, 1, 4, 8)).astype(np.int32)
    told = Conditioning(token_maps=jnp.asarray(maps))
    options = plan_prior({}, {"temperature": 0.0}, True)
    keys = jax.random.split(jax.random.key(0), 1)
    ours = jax.jit(lambda prior: prior.sample(keys, told, told, (4, 8), 4, options))(prior)
    gpt = theirs_of(prior.transformer, prior.params["transformer"])
    index, condition = torch.zeros((1, 4, 8), dtype=torch.long), torch.from_numpy(maps[:, 0]).long()
    for i in range(4):
        for j in range(8):
            row = i if i <= 2 else 4 - (4 - i) if 4 - i < 2 else 2
            column = j if j <= 2 else 4 - (8 - j) if 8 - j < 2 else 2
            rows, columns = slice(i - row, i - row + 4), slice(j - column, j - column + 4)
            parts = [x[:, rows, columns].reshape(1, -1) for x in (condition, index)]
            with torch.no_grad():
                logits, _ = gpt(torch.cat(parts, 1)[:, :-1])
            index[:, i, j] = logits[:, -16:].reshape(1, 4, 4, -1)[:, row, column].argmax(-1)
    np.testing.assert_array_equal(ours, index)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (9, 0.8), (600, 0.92)])
def test_filters_are_transformers(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (8, 1000)).astype(np.float32)
    theirs = torch.from_numpy(logits) / 0.7
    for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p)):
        theirs = theirs if value is None else warper(value)(None, theirs)
    ours = decoding.filtered(jnp.asarray(logits), 0.7, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(ours), torch.isfinite(theirs).numpy())


def test_masked_drawing_equals_amused_for_equal_noise(monkeypatch):
    """Eight steps from all masks, and from a picture of which a part is known."""
    rng, mask, length, codes = np.random.default_rng(0), 40, 16, 40
    logits = rng.normal(0, 2, (8, 2, length, codes)).astype(np.float32)
    noise = rng.gumbel(size=(8, 2, length, codes)).astype(np.float32)
    order = rng.gumbel(size=(8, 2, length)).astype(np.float32)
    step = 0

    def multinomial(probs, count, generator=None):
        drawn = torch.log(probs) + torch.from_numpy(noise[step].reshape(-1, codes))
        return drawn.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    gumbel = lambda t, generator=None: torch.from_numpy(order[step])  # noqa: E731
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", gumbel)
    for known in (0, 6):
        scheduler = scheduling_amused.AmusedScheduler(mask_token_id=mask)
        scheduler.set_timesteps(8)
        scheduler.temperatures = torch.tensor([4.5 * (1 - (i + 1) / 8) for i in range(8)])
        start = np.where(np.arange(length) < known, np.arange(length), mask)[None].repeat(2, 0)
        ours, theirs = jnp.asarray(start), torch.from_numpy(start)
        for step in range(8):
            done = scheduler.step(
                torch.from_numpy(logits[step]),
                scheduler.timesteps[step],
                theirs,
                starting_mask_ratio=(length - known) / length,
            )
            theirs = done.prev_sample
            unknown = ours == mask
            drawn = decoding.drawn(jnp.asarray(logits[step]), jnp.asarray(noise[step]), 1.0)
            drawn = jnp.where(unknown, drawn, ours)
            log_probs = jax.nn.log_softmax(logits[step])
            log_probs = jnp.take_along_axis(log_probs, drawn[..., None], -1)[..., 0]
            share = decoding.masked_share((step + 1) / 8)
            count = jnp.full(2, jnp.floor((length - known) * share), jnp.int32)
            temperature = 4.5 * (1 - (step + 1) / 8)
            again = decoding.remasked(log_probs, order[step], unknown, count, temperature)
            ours = jnp.where(again & (step < 7), mask, drawn)
            np.testing.assert_array_equal(ours, theirs)
        assert int(ours.max()) < mask


@pytest.mark.parametrize("known", [0, 6])
def test_a_whole_masked_drawing_equals_amuseds_loop(known, monkeypatch):
    """`Prior.sample` in five steps, guided, with noise in the order; codes may be known."""
    module = CodeTransformer(41, 40, 17, 16, 2, 2, causal=False)
    rng, (steps, scale) = np.random.default_rng(0), (5, 2.0)
    told, null = (Conditioning(tokens=jnp.full((2, 1), token)) for token in (3, 7))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 16), jnp.int32), told)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    prior = Prior({"transformer": params["params"]}, module, make_conditioner({}))
    keys = jax.random.split(jax.random.key(0), 2)
    codes = jnp.arange(32).reshape(2, 4, 4) % 40
    fixed = jnp.arange(16).reshape(1, 4, 4).repeat(2, 0) < known
    options = {"num_steps": steps, "guidance_scale": scale, "choice_temperature": 4.5}
    options = plan_prior({}, options, False)
    draw = jax.jit(lambda p: p.sample(keys, told, null, (4, 4), 4, options, (codes, fixed)))
    ours = np.asarray(draw(prior)).reshape(2, 16)

    def gumbel(step, shape):
        of_step = [jax.random.gumbel(jax.random.fold_in(key, step), shape) for key in keys]
        return torch.from_numpy(np.stack(of_step))

    def multinomial(probs, count, generator=None):
        drawn = torch.log(probs) + gumbel(2 * step, (16, 40)).reshape(-1, 40)
        return drawn.argmax(-1, keepdim=True)

    order = lambda t, generator=None: gumbel(2 * step + 1, (16,))  # noqa: E731
    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", order)
    scheduler = scheduling_amused.AmusedScheduler(mask_token_id=module.mask_token)
    scheduler.set_timesteps(steps)
    scheduler.temperatures = torch.tensor([4.5 * (1 - (i + 1) / steps) for i in range(steps)])
    start = np.where(fixed, codes, module.mask_token).reshape(2, 16)
    theirs, seen = torch.from_numpy(start.astype(np.int64)), []
    for step in range(steps):
        seen.append(int((theirs == module.mask_token).sum()))
        tokens = jnp.asarray(theirs.numpy(), jnp.int32)
        asked, without = (np.array(prior.logits(tokens, one)) for one in (told, null))
        logits = torch.from_numpy(without + scale * (asked - without))
        place = scheduler.timesteps[step]
        done = scheduler.step(logits, place, theirs, starting_mask_ratio=1 - known / 16)
        theirs = done.prev_sample
    np.testing.assert_array_equal(ours, theirs)
    assert seen == sorted(set(seen), reverse=True) and seen[0] == 2 * (16 - known)


def test_the_weights_that_decay_are_mingpts():
    """taming's split: `weight` of linear maps, and nothing of embeddings, norms and biases."""
    module, params, *_ = made()
    gpt = theirs_of(module, params)
    linear = {f"{name}.weight" for name, m in gpt.named_modules() if isinstance(m, torch.nn.Linear)}
    kernels = {path: in_memory(x) for path, x in flat(params).items() if path.endswith("kernel")}
    assert set(write_tensors(TABLE, kernels)) == linear
