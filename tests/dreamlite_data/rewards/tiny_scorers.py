"""Tiny random checkpoints of the further scorers, each written in its original layout by a plain network of the original formula.
The plain networks are the oracles: nothing of them comes from transformers or from the code under test."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

WORDS = "a an the red green blue circle square large small photo of on with and".split()
SIDE_PX, PATCH_PX, TEXT_TOKENS = 28, 7, 16


def clip_tokenizer(folder: Path):
    """Word-level, with CLIP's order of ids: the end token is the highest and pads too."""
    return _tokenizer(
        folder,
        [*WORDS, "<unk>", "<s>", "</s>"],
        "<s> $A </s>",
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
    )


def bert_tokenizer(folder: Path):
    """Word-level, with BERT's special tokens."""
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return _tokenizer(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS], "[CLS] $A [SEP]", special)


def _tokenizer(folder: Path, words: list[str], single: str, special: dict[str, str]):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(mark, vocabulary[mark]) for mark in single.split() if mark != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TEXT_TOKENS, **special)
    wrapped.save_pretrained(folder)
    return wrapped


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        spread = 0.1 if value.ndim == 1 else 0.25
        offset = 1.0 if name.endswith("weight") and value.ndim == 1 else 0.0
        value.data = torch.randn(value.shape, generator=generator) * spread + offset
    return network.requires_grad_(False).eval()


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 2 * width), gelu=nn.GELU(), c_proj=nn.Linear(2 * width, width)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH_PX, PATCH_PX, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE_PX // PATCH_PX) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(width, 2, 2)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP: its names, its formula."""

    def __init__(self, words: int, vision: int = 24, text: int = 16, out: int = 12) -> None:
        super().__init__()
        self.visual = _Visual(vision, out)
        self.transformer = _Transformer(text, 2, 2)
        self.token_embedding = nn.Embedding(words, text)
        self.positional_embedding = nn.Parameter(torch.zeros(TEXT_TOKENS, text))
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.zeros(text, out))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def words(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection

    def cosine(self, image: Tensor, ids: Tensor) -> Tensor:
        return (nn.functional.normalize(self.visual(image), dim=-1) * nn.functional.normalize(self.words(ids), dim=-1)).sum(-1)


def clip_config(words: int):
    from transformers import CLIPConfig

    end = words - 1
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": words, "hidden_act": "gelu",
            "max_position_embeddings": TEXT_TOKENS, "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE_PX,
              "patch_size": PATCH_PX, "hidden_act": "gelu"}  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def tiny_hpsv2(folder: Path) -> OpenClip:
    """`HPS_v2.1_compressed.pt` as released: {'state_dict': ...}; config.json and tokenizer of a CLIPModel beside it."""
    tokenizer = clip_tokenizer(folder)
    network = randomise(OpenClip(len(tokenizer)))
    torch.save({"state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    clip_config(len(tokenizer)).save_pretrained(folder)
    return network


def tiny_clip_model(folder: Path, seed: int = 0):
    """A CLIPModel folder as PickScore's: model.safetensors, processor, tokenizer. Returns the library's own model."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = clip_tokenizer(folder)
    network = CLIPModel(clip_config(len(tokenizer)))
    randomise(network, seed)
    network.logit_scale.data.fill_(2.0)
    network.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return network


def tiny_siglip_model(folder: Path):
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 8, "projection_size": 16, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**sizes, "image_size": SIDE_PX, "patch_size": PATCH_PX},
    )
    network = SiglipModel(config)
    randomise(network)
    network.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return network


def laion_head(width: int) -> nn.Sequential:
    """Numbers 0, 2, 4, 6, 7: dropout stands between, as in LAION's predictor."""
    head = nn.Sequential(
        nn.Linear(width, 10), nn.Dropout(0.2), nn.Linear(10, 6), nn.Dropout(0.2), nn.Linear(6, 5), nn.Dropout(0.1),
        nn.Linear(5, 4), nn.Linear(4, 1),
    )  # fmt: skip
    return randomise(head, 5)


def save_laion_head(folder: Path, head: nn.Sequential) -> None:
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, folder / "sac+logos+ava1-l14-linearMSE.pth")


class PlainBlip:
    """BLIP's formula over a state dict in its own layout: ViT, then BERT with cross-attention and no causal mask."""

    VISION, TEXT, TEXT_HEADS, INNER = 128, 24, 2, 40

    def __init__(self, words: int) -> None:
        self.state = self._random_state(words)

    def _random_state(self, words: int) -> dict[str, Tensor]:
        v, t, inner = self.VISION, self.TEXT, self.INNER
        shapes: dict[str, tuple[int, ...]] = {
            "visual_encoder.cls_token": (1, 1, v), "visual_encoder.pos_embed": (1, (SIDE_PX // PATCH_PX) ** 2 + 1, v),
            "visual_encoder.patch_embed.proj.weight": (v, 3, PATCH_PX, PATCH_PX), "visual_encoder.patch_embed.proj.bias": (v,),
            "text_encoder.embeddings.word_embeddings.weight": (words, t), "text_encoder.embeddings.position_embeddings.weight": (40, t),
        }  # fmt: skip
        linears = {"vision_proj": (8, v), "text_proj": (8, t)}
        norms = {"visual_encoder.norm": v, "text_encoder.embeddings.LayerNorm": t}
        for block in (f"visual_encoder.blocks.{n}" for n in range(2)):
            linears |= {
                f"{block}.attn.qkv": (3 * v, v),
                f"{block}.attn.proj": (v, v),
                f"{block}.mlp.fc1": (2 * v, v),
                f"{block}.mlp.fc2": (v, 2 * v),
            }
            norms |= {f"{block}.norm1": v, f"{block}.norm2": v}
        for layer in (f"text_encoder.encoder.layer.{n}" for n in range(2)):
            for part, seen in (("attention", t), ("crossattention", v)):
                linears |= {
                    f"{layer}.{part}.self.query": (t, t),
                    f"{layer}.{part}.self.key": (t, seen),
                    f"{layer}.{part}.self.value": (t, seen),
                }
                linears |= {f"{layer}.{part}.output.dense": (t, t)}
                norms |= {f"{layer}.{part}.output.LayerNorm": t}
            linears |= {f"{layer}.intermediate.dense": (inner, t), f"{layer}.output.dense": (t, inner)}
            norms |= {f"{layer}.output.LayerNorm": t}
        for name, (after, before) in linears.items():
            shapes |= {f"{name}.weight": (after, before), f"{name}.bias": (after,)}
        generator = torch.Generator().manual_seed(3)
        state = {f"blip.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
        for name, width in norms.items():
            state |= {
                f"blip.{name}.weight": 1 + torch.randn(width, generator=generator) * 0.1,
                f"blip.{name}.bias": torch.randn(width, generator=generator) * 0.1,
            }
        for place, (before, after) in zip((0, 2, 4, 6, 7), ((t, 12), (12, 8), (8, 6), (6, 4), (4, 1)), strict=True):
            state |= {
                f"mlp.layers.{place}.weight": torch.randn((after, before), generator=generator) * 0.4,
                f"mlp.layers.{place}.bias": torch.randn(after, generator=generator),
            }
        state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
        return state

    def save(self, folder: Path) -> None:
        torch.save(self.state, folder / "ImageReward.pt")
        med = {"hidden_size": self.TEXT, "intermediate_size": self.INNER, "num_hidden_layers": 2, "num_attention_heads": self.TEXT_HEADS,
               "max_position_embeddings": 40, "vocab_size": 30522, "hidden_act": "gelu", "layer_norm_eps": 1e-12}  # fmt: skip
        (folder / "med_config.json").write_text(json.dumps(med))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def raw(self, image: Tensor, ids: Tensor) -> Tensor:
        """Raw reward [B] of normalised images and unpadded ids."""
        see = "blip.visual_encoder"
        x = nn.functional.conv2d(image, self.state[f"{see}.patch_embed.proj.weight"], self.state[f"{see}.patch_embed.proj.bias"], PATCH_PX)
        x = (
            torch.cat([self.state[f"{see}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
            + self.state[f"{see}.pos_embed"]
        )
        for block in (f"{see}.blocks.{n}" for n in range(2)):
            q, k, v = self._linear(f"{block}.attn.qkv", self._norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self._linear(f"{block}.attn.proj", self._attend(q, k, v, self.VISION // 64))
            y = nn.functional.gelu(self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.norm2", x, 1e-6)))
            x = x + self._linear(f"{block}.mlp.fc2", y)
        seen = self._norm(f"{see}.norm", x, 1e-6)
        read = "blip.text_encoder"
        y = (
            self.state[f"{read}.embeddings.word_embeddings.weight"][ids]
            + self.state[f"{read}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        )
        y = self._norm(f"{read}.embeddings.LayerNorm", y, 1e-12)
        for layer in (f"{read}.encoder.layer.{n}" for n in range(2)):
            for part, other in (("attention", None), ("crossattention", seen)):
                name, context = f"{layer}.{part}", y if other is None else other
                z = self._attend(
                    *(self._linear(f"{name}.self.{each}", y if each == "query" else context) for each in ("query", "key", "value")),
                    self.TEXT_HEADS,
                )
                y = self._norm(f"{name}.output.LayerNorm", self._linear(f"{name}.output.dense", z) + y, 1e-12)
            z = self._linear(f"{layer}.output.dense", nn.functional.gelu(self._linear(f"{layer}.intermediate.dense", y)))
            y = self._norm(f"{layer}.output.LayerNorm", z + y, 1e-12)
        value = y[:, 0]
        for place in (0, 2, 4, 6, 7):
            value = self._linear(f"mlp.layers.{place}", value)
        return value[:, 0]


def tiny_image_reward(folder: Path) -> PlainBlip:
    plain = PlainBlip(len(bert_tokenizer(folder)))
    plain.save(folder)
    return plain
