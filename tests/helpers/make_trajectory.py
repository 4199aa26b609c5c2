"""Writes data/trajectory.npz: twenty updates of a small keyframe network in PyTorch, for the trainer to repeat.

    pip install 'keysync-jax[torch]' && python tests/helpers/make_trajectory.py

The network is diffusers' SVD U-Net with the reference's epsilon of the norms, its audio paths and its denoiser (KeySync reference at
commit cfff7cf) written out below; the optimizer is torch.optim.AdamW behind a LambdaLR warm-up. Nothing of `keysync_jax` computes
here but the initial weights, which both sides draw from the same seed, and the names of the parameters.
"""

import numpy as np
import torch
import trajectory as setup
from diffusers import UNetSpatioTemporalConditionModel

from keysync_jax.converters import diffusers, sgm
from keysync_jax.models import table
from keysync_jax.models.stage import init_params

PREFIX = sgm.UNET_PREFIX


def build(params) -> torch.nn.ModuleDict:
    """The network with our initial weights; frozen tensors ask for no gradient."""
    stage = setup.CONFIG.stage
    unet = UNetSpatioTemporalConditionModel(
        **{k: v for k, v in diffusers.unet_config_to_diffusers(stage.unet, stage.latent_size).items() if not k.startswith("_")}
    )
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and ("resnets" in name or name == "conv_norm_out"):
            module.eps = 1e-5
    linear = torch.nn.Linear(stage.audio_feature_dim, stage.unet.context_dim)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in table.to_torch(sgm.stage_table(stage), params)}
    names = diffusers.unet_map(stage.unet)
    unet.load_state_dict({name: tensors[PREFIX + key] for name, key in names.items()})
    linear.load_state_dict({leaf: tensors[f"{sgm.audio_linear(stage)}.{leaf}"] for leaf in ("weight", "bias")})
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(not sgm.is_frozen(PREFIX + names[name]))
    return torch.nn.ModuleDict({"unet": unet, "linear": linear})


def forward(unet, x, c_noise, tokens):
    """diffusers' forward pass, but for the embedding: every frame adds the embedding of its own audio token."""
    b, t = x.shape[:2]
    emb = unet.time_embedding(unet.time_proj(c_noise)).repeat_interleave(t, 0) + unet.add_embedding(tokens.flatten(0, 1))
    context = tokens.repeat_interleave(t, 0)
    still = torch.zeros(b, t)
    h = unet.conv_in(x.flatten(0, 1))
    skips = (h,)
    for block in unet.down_blocks:
        attends = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        h, states = block(hidden_states=h, temb=emb, image_only_indicator=still, **attends)
        skips += states
    h = unet.mid_block(hidden_states=h, temb=emb, encoder_hidden_states=context, image_only_indicator=still)
    for block in unet.up_blocks:
        attends = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        count = len(block.resnets)
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=skips[-count:], image_only_indicator=still, **attends)
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))).reshape(b, t, -1, *x.shape[3:])


def loss_of(model, batch, drawn):
    """The reference's loss: noise, masked composite, preconditioning, V weighting."""
    channels_first = {k: torch.from_numpy(np.moveaxis(v, -1, -3).copy()) for k, v in batch.items() if k != "audio"}
    x0, masks = channels_first["known"], channels_first["mask"]
    noise = torch.from_numpy(np.moveaxis(drawn["noise"], -1, -3).copy())
    sigma = torch.exp(1.0 + 1.2 * torch.from_numpy(drawn["normals"]))
    s = sigma.reshape(-1, 1, 1, 1, 1)
    keep_audio, keep_identity = (torch.from_numpy(drawn[name].astype(np.float32)) for name in ("keep_audio", "keep_identity"))
    tokens = model["linear"](torch.from_numpy(batch["audio"]).mean(2)) * keep_audio[:, None, None]
    identity = (channels_first["identity"] / setup.CONFIG.stage.latent_scale)[:, None] * keep_identity[:, :, None, None, None]
    x = masks * (x0 + noise * s) + (1 - masks) * x0
    network = forward(model["unet"], torch.cat([x / torch.sqrt(s**2 + 1), identity], 2), 0.25 * torch.log(sigma), tokens)
    denoised = x / (s**2 + 1) - network * s / torch.sqrt(s**2 + 1)
    denoised = masks * denoised + (1 - masks) * x0
    weight = (sigma**2 + 1) / sigma**2
    return (weight[:, None] * ((denoised - x0) ** 2).mean((2, 3, 4))).mean()


def optimizer_of(parameters, config):
    """AdamW and its warm-up as the reference configures them."""
    adamw = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps, weight_decay=config.weight_decay
    )
    start, length = config.warmup_start, config.warmup_steps
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda n: start + (1 - start) * n / length if n < length else 1.0)


def train(params) -> dict[str, np.ndarray]:
    model = build(params)
    before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    adamw, schedule = optimizer_of(model.parameters(), setup.CONFIG.optimizer)  # frozen ones too, as in the reference
    losses, rates = [], []
    for step in range(setup.STEPS):
        loss = loss_of(model, setup.batch(step), setup.drawn(step))
        adamw.zero_grad()
        loss.backward()
        rates.append(adamw.param_groups[0]["lr"])
        adamw.step()
        schedule.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.6f}, rate {rates[-1]:.3g}")
    names = diffusers.unet_map(setup.CONFIG.stage.unet)
    out = {"losses": np.array(losses), "rates": np.array(rates)}
    for name, p in model.named_parameters():
        part, _, rest = name.partition(".")
        key = f"{sgm.audio_linear(setup.CONFIG.stage)}.{rest}" if part == "linear" else PREFIX + names[rest]
        moved = (p.detach().double() - before[name]).numpy()
        out[f"norm/{key}"] = np.linalg.norm(moved)
        if p.requires_grad:
            out[f"update/{key}"] = moved.ravel()[:: max(1, moved.size // 64)][:64].astype(np.float32)
    return out


def optimizer_alone() -> np.ndarray:
    """The parameters after every step."""
    p = torch.nn.Parameter(torch.from_numpy(setup.given(0)[0].copy()))
    adamw, schedule = optimizer_of([p], setup.ALONE)
    states = []
    for step in range(setup.STEPS):
        p.grad = torch.from_numpy(setup.given(step)[1])
        adamw.step()
        schedule.step()
        states.append(p.detach().numpy().copy())
    return np.stack(states)


if __name__ == "__main__":
    torch.set_num_threads(1)
    initial = init_params(setup.CONFIG.stage, setup.SEED, zero_init=False, gain=3**0.5)
    setup.FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(setup.FILE, alone=optimizer_alone(), **train(initial))
    print(f"{setup.FILE}: {setup.FILE.stat().st_size} bytes")
