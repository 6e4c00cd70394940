"""LOOP.md of a bundle: the sampling loop in words and steps, with the manifest's own numbers, for a port to Swift or Kotlin.
Written from the manifest alone, so that page and constants cannot part."""

from __future__ import annotations

from typing import Any

PAGE = """# The loop, for a port to a phone

Every number here stands in `manifest.json`; `runner.py` does the same in {runner_lines}. All tensors are float32 in row-major
order unless said otherwise; B is the number of images made at once (1 on a phone, at most {max_batch}).

## Graphs

| graph | inputs | output |
|---|---|---|
{graphs}

Files by variant:

| variant | {parts} |
|---|{dashes}
{variants}

Session options: {options}.

## 1. Text

Tokenizer: `tokenizer/tokenizer.json` (Hugging Face tokenizers format), no padding, no truncation, no added tokens. Padding
id {pad}; ids and mask are int64, right padded. `{{}}` is replaced by the user's words.

Generate: user text `{generate_prompt}`, put into

```text
{generate_template}
```

Cut or pad to {generate_room} ids, run `text_encoder`, drop the first {generate_drop} positions of states and mask: {tokens} stay.

Edit: user text `{edit_prompt}`, put into

```text
{edit_template}
```

with `{image_token}` written {vision_tokens} times. More than {edit_room} ids: refuse, for a cut prompt would lose its end. Pixels of
the source for `edit_encoder`: RGB, squeezed to {resize} x {resize} px with Lanczos, then to {grid_columns} x {grid_rows} px (width x
height) with bicubic, divided by 255, planes first, not normalized (the graph does that). Drop the first {edit_drop} positions.

Hidden state: `{hidden_state}` of `{encoder}`, width {text_width}. Multiply the states by the mask. {external}

## 2. Latents

- `x`: normal noise (B, {channels}, {height}, {width}). The samples draw it with NumPy's PCG64; a phone may draw its own.
- `c`: zeros for generate (not the latent of a black image); for edit `vae_encoder` of the source, squeezed to {image_width} x
  {image_height} px with Lanczos, divided by 255, times 2, minus 1, planes first.

## 3. {steps} steps

Sigmas, of which the last is 0: {sigmas}

```text
for i in 0 ..< {steps}:
    sample   = concat(x, c, axis: 3)                      // (B, {channels}, {height}, {double}); x stands left
    timestep = [1000 * sigma[i]] * B                      // {timesteps}; keep float32: half precision is another time
    v        = unet(sample, timestep, states, mask, time_ids: [[{image_width}, {image_height}]] * B)   // time_ids: width, height of ONE panel
    x        = x + (sigma[i + 1] - sigma[i]) * v[..., 0 ..< {width}]                  // the left half; the step is negative
```

No guidance: the student was distilled with it, so one UNet call a step is all.

## 4. Image

`vae_decoder(x)`, then clamp(y / 2 + 0.5, 0, 1) * 255, rounded, to RGB bytes.

## Check

`samples/samples.json` lists prompts, seeds and source pictures; `samples/generate.npz` and `samples/edit.npz` hold noise, condition
latent, hidden states, UNet inputs and velocities at every step, latents and images as torch made them. `parity` in the manifest says
how far each variant comes out from them.
"""


def describe_loop(manifest: dict[str, Any]) -> str:
    """The page for a bundle with this manifest; raises KeyError where a constant is missing."""
    shapes, prompts, sampler, vision, encoder = (manifest[key] for key in ("shapes", "prompts", "sampler", "vision", "encoder"))
    latent, image, tokens = shapes["latent"], shapes["image"], shapes["sequence_tokens"]
    parts = sorted(manifest["graphs"])
    variants = [
        f"| {name} | " + " | ".join(entry["files"][part] for part in parts) + " |"
        for name, entry in sorted(manifest["variants"].items())
    ]
    options = [
        f"`{key}={value}` for {name} (does nothing on ARM)"
        for name, entry in sorted(manifest["variants"].items())
        for key, value in entry["session_options"].items()
    ]
    return PAGE.format(
        runner_lines="numpy and ONNX Runtime",
        max_batch=shapes["max_batch"],
        graphs="\n".join(f"| `{name}` | {_ports(graph['inputs'])} | {_ports(graph['outputs'])} |" for name, graph in sorted(manifest["graphs"].items())),
        parts=" | ".join(parts),
        dashes="---|" * len(parts),
        variants="\n".join(variants),
        options=", ".join(options) or "none",
        pad=encoder["pad_token_id"],
        generate_prompt=prompts["generate_prompt"],
        generate_template=prompts["generate_template"].rstrip("\n") + "  <- and a line break",
        generate_room=prompts["generate_drop_tokens"] + tokens,
        generate_drop=prompts["generate_drop_tokens"],
        tokens=tokens,
        edit_prompt=prompts["edit_prompt"],
        edit_template=prompts["edit_template"].rstrip("\n") + "  <- and a line break",
        edit_room=prompts["edit_drop_tokens"] + tokens,
        edit_drop=prompts["edit_drop_tokens"],
        image_token=prompts["image_token"],
        vision_tokens=vision["tokens"],
        resize=vision["resize_px"],
        grid_rows=vision["grid_px"][0],
        grid_columns=vision["grid_px"][1],
        hidden_state=encoder["hidden_state"],
        encoder=encoder["name"],
        text_width=encoder["width"],
        external=_external(encoder),
        channels=latent["channels"],
        height=latent["height"],
        width=latent["width"],
        double=2 * latent["width"],
        image_width=image["width"],
        image_height=image["height"],
        steps=sampler["steps"],
        sigmas=", ".join(f"{sigma:.8g}" for sigma in sampler["sigmas"]),
        timesteps=", ".join(f"{1000 * sigma:.7g}" for sigma in sampler["sigmas"][:-1]),
    )


def _external(encoder: dict[str, Any]) -> str:
    """What to do where the encoder is no graph of the bundle."""
    if encoder["exported"]:
        return ""
    weights = encoder.get("weights")
    if weights is None:
        return "The encoder is not in this bundle: run it by your own means and check it against the samples."
    return (
        f"The encoder is no graph: `{weights['folder']}/` holds its weights in {weights['bits']} bits as MLX loads them (mlx-swift on a phone, "
        f"`mlx_vlm.utils.load_model` elsewhere; {weights['group_values']} values share a scale and a bias, the vision tower is in 16 bits, "
        "there is no language head). Check its states against `hidden_states` of the samples: `encoder.weights` in the manifest says "
        "how far these weights come out from them."
    )


def _ports(ports: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` {port['dtype']} {port['shape']}".replace("'batch'", "B") for name, port in ports.items())
