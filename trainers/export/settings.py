"""What can be chosen about an export, in one place; every field changes bytes of the bundle or of its report.
Composed by the pipeline configuration, so unknown keys are refused there and here alike."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dreamlite_data.strict_settings import StrictSettings

Variant = Literal["fp32", "fp16", "int8", "int4"]
Target = Literal["onnxruntime", "coreml", "executorch"]

RELEASE_LICENCE = "CC-BY-NC-4.0"
"""Licence of the released DreamLite weights; everything derived from them inherits it."""


class ExportSettings(StrictSettings):
    """Settings of `export_bundle` and `evaluate_bundle`."""

    steps: int = Field(4, ge=1, le=64, description="Euler steps the student was distilled for.")
    sequence_tokens: int = Field(
        128, ge=8, description="Text tokens the UNet sees after the dropped prefix; longer prompts are cut, edits refused."
    )
    text_encoder: bool = Field(
        True, description="Export the encoder as ONNX too. Off: a named part with a contract, for a runtime of its own (a 2 B encoder)."
    )
    encoder_bits: Literal[4, 8] | None = Field(
        4, description="Where the encoder is no graph, its weights in blocks of so many bits, as MLX loads them; null: left out."
    )
    encoder_block_values: Literal[32, 64, 128] = Field(64, description="Weights of the encoder that share a scale.")
    targets: tuple[Target, ...] = Field(
        ("onnxruntime",),
        description="What the bundle runs on. onnxruntime is always among them, for the others are calibrated with it; coreml and "
        "executorch each need the extra of their name.",
    )
    coreml_weights: tuple[Literal["int8", "palette6", "palette4"], ...] = Field(
        ("int8", "palette6"), description="Forms of the Core ML UNet's weights beside fp16; a palette has 2^6 or 2^4 values a tensor."
    )
    variants: tuple[Variant, ...] = Field(
        ("fp32", "fp16", "int8", "int4"),
        description="Forms of the graphs in the bundle; fp32 is what the others are measured against. int8: the UNet in 8-bit "
        "arithmetic, 8-bit weights elsewhere. int4: UNet and encoders on weights in blocks of 4 bits, the VAE as in int8.",
    )
    block_values: Literal[16, 32, 64, 128] = Field(32, description="Weights that share a scale, where weights are in blocks.")
    weight_type: Literal["int8", "uint8"] = Field(
        "int8",
        description="int8: symmetric, what phone compilers take; x86 needs session.x64quantprecision, which the runner sets. "
        "uint8: right everywhere without that option.",
    )
    per_channel: bool = Field(True, description="One weight scale per output channel.")
    calibration_rows: int = Field(64, ge=1, description="Rows taken from the calibration list, generate and edit in turn.")
    calibration_method: Literal["minmax", "percentile"] = "minmax"
    calibration_percentile: float = Field(99.99, gt=50, le=100)
    float_layers: tuple[str, ...] = Field(
        ("conv_in", "conv_out", "time_embedding", "add_embedding"),
        description="UNet layers whose path contains one of these compute in float in int8, and keep float weights in int4.",
    )
    scan_rows: int = Field(2, ge=0, description="Rows per task on which each block's harm by int8 is measured; 0: no scan, all int8.")
    int8_psnr_db: float = Field(
        40.0, description="Blocks of the int8 UNet go back to half precision, the most harmful for their bytes first, below this PSNR."
    )
    int8_size_share: float = Field(
        0.4, gt=0, le=1, description="The int8 UNet never takes more of the fp32 UNet's bytes by blocks that go back."
    )
    parity_rows: int = Field(4, ge=1, description="Rows per task of the parity report; also the bundle's samples.")
    max_abs_error: float = Field(1e-3, gt=0, description="A float graph further than this from torch stops the export.")
    evaluate_rows: int = Field(192, ge=1, description="Held-out prompts, and as many edits, in evaluate_bundle.")
    evaluate_seed: int = Field(20_260_328, description="Draws the questions; equal to evaluate.seed, so that numbers compare.")
    threads: int = Field(1, ge=1, description="ONNX Runtime threads; one is fastest for small nets on a busy machine.")
    seed: int = 0
    weights_licence: str = "Apache-2.0"
    derived_from_release: bool = Field(False, description="The run started from the released DreamLite weights.")

    def carrying(self, weights: dict[str, Any]) -> ExportSettings:
        """These settings with the licence of the weights that a checkpoint was trained from (`weights` in its dreamlite.json).

        Raises ValueError where the settings name another licence: what starts from released weights keeps theirs.
        """
        licence = weights.get("licence")
        if not licence:
            return self
        named = "weights_licence" in self.model_fields_set and self.weights_licence != licence
        if named:
            raise ValueError(
                f"export.weights_licence is '{self.weights_licence}', but the checkpoint was trained from {weights.get('origin')}, whose "
                f"weights are under {licence}; leave export.weights_licence out."
            )
        derived = self.derived_from_release or bool(weights.get("derived_from_release"))
        return ExportSettings(**self.model_dump() | {"weights_licence": licence, "derived_from_release": derived})

    @model_validator(mode="after")
    def _calibrated_with_onnxruntime(self) -> ExportSettings:
        if "onnxruntime" not in self.targets:
            raise ValueError(f"export.targets {list(self.targets)} lacks 'onnxruntime', whose graphs calibrate the other targets; add it.")
        return self

    @model_validator(mode="after")
    def _measured_against_float(self) -> ExportSettings:
        if "fp32" not in self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(
                f"export.variants is {list(self.variants)}; name each once and keep fp32, which the others are measured against."
            )
        return self

    @model_validator(mode="after")
    def _inherit_licence(self) -> ExportSettings:
        if self.derived_from_release and self.weights_licence != RELEASE_LICENCE:
            raise ValueError(
                f"export.weights_licence is '{self.weights_licence}', but weights derived from the DreamLite release "
                f"are {RELEASE_LICENCE}; set export.weights_licence: {RELEASE_LICENCE}."
            )
        return self
