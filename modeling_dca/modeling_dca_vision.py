"""DeepCrossAttention (DCA) vision models: ViT's parts, in ViT's places, around the blocks of the language models."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dca import DCAVisionConfig
from .grn import GeneralizedResidual
from .modeling_dca import (
    DCALayer,
    DCAPreTrainedModel,
    ResidualConversionMixin,
    name_in_tables,
    named_arguments,
    sincos_embedding,
    take_loss_arguments,
)
from .norm import build_norm


class DCAVisionPatchEmbeddings(nn.Module):
    """Embeds the patches of images `(batch, channels, height, width)` as `(batch, patches, hidden_size)`."""

    def __init__(self, config: DCAVisionConfig):
        super().__init__()
        self.num_channels = config.num_channels
        patch_size = config.patch_height_width
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` has {pixel_values.shape[1]} channels, but the model's `num_channels` is "
                f"{self.num_channels}: convert the images."
            )
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class DCAVisionEmbeddings(nn.Module):
    """Class token (if `pooling` reads it), registers and patch embeddings, in this order, with positions."""

    def __init__(self, config: DCAVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = DCAVisionPatchEmbeddings(config)
        self.cls_token = self.register_tokens = None
        if config.pooling != "mean":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.num_register_tokens > 0:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.position_embeddings = None
        if config.position_embedding == "learned":
            rows, columns = self._grid(*config.image_height_width)
            num_positions = config.num_prefix_tokens + rows * columns
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch_height, patch_width = self.config.patch_height_width
        return height // patch_height, width // patch_width

    def _learned_positions(self, height: int, width: int) -> torch.Tensor:
        """The learned positions, resampled for images of another size than the configuration's."""
        if (height, width) == self.config.image_height_width:
            return self.position_embeddings
        prefix_positions = self.position_embeddings[:, : self.config.num_prefix_tokens]
        patch_positions = self.position_embeddings[:, self.config.num_prefix_tokens :]
        patch_positions = patch_positions.unflatten(1, self._grid(*self.config.image_height_width)).permute(0, 3, 1, 2)
        # In float32: in half precision the resampling shifts the positions.
        patch_positions = nn.functional.interpolate(
            patch_positions.float(),
            size=self._grid(height, width),
            mode="bicubic",
            align_corners=False,
            antialias=self.config.antialias_pos_encoding,
        ).to(prefix_positions.dtype)
        return torch.cat((prefix_positions, patch_positions.flatten(2).transpose(1, 2)), dim=1)

    def _sincos_positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """Fixed 2-D positions: half of the features hold the column, half the row. Tokens before the patches have none."""
        rows, columns = self._grid(height, width)
        row = torch.arange(rows, device=like.device).repeat_interleave(columns)
        column = torch.arange(columns, device=like.device).repeat(rows)
        half = self.config.hidden_size // 2
        positions = torch.cat((sincos_embedding(column, half), sincos_embedding(row, half)), dim=-1).to(like.dtype)
        return nn.functional.pad(positions, (0, 0, self.config.num_prefix_tokens, 0))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if interpolate_pos_encoding is None:
            interpolate_pos_encoding = self.config.interpolate_pos_encoding
        if not interpolate_pos_encoding and (height, width) != self.config.image_height_width:
            raise ValueError(
                f"The images are {height} x {width} pixels, but the model's `image_size` is {self.config.image_size}: "
                "resize them, or pass `interpolate_pos_encoding=True`."
            )
        embeddings = self.patch_embeddings(pixel_values)
        prefix = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        if prefix:
            embeddings = torch.cat([*(token.expand(len(embeddings), -1, -1) for token in prefix), embeddings], dim=1)
        if self.position_embeddings is not None:
            embeddings = embeddings + self._learned_positions(height, width)
        elif self.config.position_embedding == "sincos":
            embeddings = embeddings + self._sincos_positions(height, width, like=embeddings)
        return embeddings


class DCAVisionPreTrainedModel(DCAPreTrainedModel):
    """The base of the DCA vision models."""

    config_class = DCAVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["DCAVisionEmbeddings", "DCALayer"]
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DCAVisionEmbeddings):
            for parameter in (module.cls_token, module.register_tokens, module.position_embeddings):
                if parameter is not None:
                    init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DCAVisionModel(ResidualConversionMixin, DCAVisionPreTrainedModel):
    """The DCA vision encoder. Each block takes the stack: the embeddings and the outputs of all earlier blocks."""

    _auto_class = "AutoModel"

    def __init__(self, config: DCAVisionConfig):
        super().__init__(config)
        self.embeddings = DCAVisionEmbeddings(config)
        self.layers = nn.ModuleList(
            [DCALayer(config, layer_idx, is_causal=False) for layer_idx in range(config.num_hidden_layers)]
        )
        self.residual = GeneralizedResidual(config, num_blocks=config.num_hidden_layers, outputs=1)
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False

        self.post_init()

    @named_arguments
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`): the images.
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`
                (`config.interpolate_pos_encoding` if not given).

        Returns:
            `last_hidden_state` `(batch, tokens, hidden_size)` after the final norm, and `pooler_output`
            `(batch, pooled_size)`, pooled from it as `config.pooling` says. `hidden_states[i]`, if asked for, is the
            queries' input of block `i`. The last one is the output before the final norm.

        Raises:
            `ValueError`: the images are missing, or have another size or number of channels than the configuration.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        embeddings = self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype), interpolate_pos_encoding
        )

        self._check_recording(kwargs)
        stack = (embeddings,)
        for layer in self.layers:
            stack = layer(*stack, **kwargs)
            stack = (stack,) if isinstance(stack, torch.Tensor) else stack

        hidden_states, _ = self.residual(*stack)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self._pool(hidden_states))

    def _pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.config.pooling == "cls":
            return hidden_states[:, 0]
        if self.config.pooling == "cls_registers":
            return hidden_states[:, : self.config.num_prefix_tokens].flatten(1)
        mean = hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1)
        return mean if self.config.pooling == "mean" else torch.cat((hidden_states[:, 0], mean), dim=-1)


class DCAVisionBackbone(BackboneMixin, DCAVisionModel):
    """The DCA vision encoder as a backbone with feature maps from several depths, for example for detectors."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: DCAVisionConfig):
        # (Where nobody has asked, it is the last.)
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.num_features = [config.hidden_size] * config.num_residual_inputs

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`): the images.

        Returns:
            `feature_maps`, those of `config.out_features`: hidden states after the final norm, without the tokens before the
            patches, `(batch, hidden_size, rows, columns)` each.
        """
        outputs = DCAVisionModel.forward(
            self, pixel_values, **kwargs
        )  # (the mixin has a `forward`, too, which is not one)
        grid = self.embeddings._grid(*pixel_values.shape[-2:])
        feature_maps = tuple(
            self.norm(hidden_states)[:, self.config.num_prefix_tokens :].mT.unflatten(2, grid)
            for name, hidden_states in zip(self.stage_names, outputs.hidden_states)
            if name in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DCAForImageClassification(ResidualConversionMixin, DCAVisionPreTrainedModel):
    """The DCA vision encoder with a linear classifier on its pooled output."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: DCAVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DCAVisionModel(config)
        self.classifier = nn.Linear(config.pooled_size, config.num_labels) if config.num_labels > 0 else nn.Identity()

        self.post_init()

    @named_arguments
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`): the images.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): classes in `[0, config.num_labels)`, or, with
                `num_labels == 1`, the values of a regression.
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`
                (`config.interpolate_pos_encoding` if not given).

        Returns:
            `logits` `(batch, num_labels)` and, with `labels`, `loss`.
        """
        loss_kwargs = take_loss_arguments(self, kwargs)
        outputs: BaseModelOutputWithPooling = self.model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        logits = self.classifier(outputs.pooler_output)

        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs, **loss_kwargs)

        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


name_in_tables(
    DCAVisionConfig.model_type,
    {
        "MODEL_MAPPING_NAMES": "DCAVisionModel",
        "MODEL_FOR_IMAGE_MAPPING_NAMES": "DCAVisionModel",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "DCAForImageClassification",
        "MODEL_FOR_BACKBONE_MAPPING_NAMES": "DCAVisionBackbone",
    },
)


__all__ = ["DCAForImageClassification", "DCAVisionBackbone", "DCAVisionModel", "DCAVisionPreTrainedModel"]
