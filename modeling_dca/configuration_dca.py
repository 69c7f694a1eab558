"""Configurations of the DeepCrossAttention (DCA) models."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils.type_validators import interval

from .peft_dca import name_in_peft


if TYPE_CHECKING:
    # With a configuration, transformers saves the modules that its module imports from. These must include the models, which
    # the saved configuration names.
    from .modeling_dca_vision import DCAVisionModel  # noqa: F401


class ResidualScheme(NamedTuple):
    """The parameters of a residual scheme (paper, section 3.1)."""

    outputs: int  # generalized residuals per block: one shared by queries, keys and values, or one for each
    elementwise: bool  # whether `b` has an element per feature instead of one for the whole entry
    gated: bool  # whether `relu(w . n(f_i))` is added to `b`


#: The schemes by name; `standard` is the plain residual sum, without parameters.
RESIDUAL_SCHEMES: dict[str, ResidualScheme | None] = {
    "standard": None,
    "grn_v1": ResidualScheme(outputs=1, elementwise=False, gated=False),
    "grn_v2": ResidualScheme(outputs=1, elementwise=True, gated=False),
    "grn_v3": ResidualScheme(outputs=1, elementwise=True, gated=True),
    "dca": ResidualScheme(outputs=3, elementwise=True, gated=True),
}


#: The placement of the norms of a block: before its modules (as in the paper), after them, or both.
NORM_PLACEMENTS = ("pre", "sandwich", "post_module")

#: The norm of a gate's input, which `config.json` names if the scheme has gates. In release 0.1, gates had no norm.
GATE_NORM = "rms"


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known name, and all known names."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}."


@strict
class DCABaseConfig(PreTrainedConfig):
    r"""
    The fields that the configurations of DCA's text and vision models share: those of the blocks.

    Args:
        hidden_size (`int`, *optional*, defaults to 512):
            Width of the model.
        intermediate_size (`int`, *optional*):
            Width of the feed-forward module; 4 x `hidden_size` if not given.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads (grouped-query attention); `num_attention_heads` if not given.
        head_dim (`int`, *optional*):
            Width of a head; `hidden_size // num_attention_heads` if not given.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            The activation of the feed-forward module.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        residual_scheme (`str`, *optional*, defaults to `"dca"`):
            How a block's input is formed from the outputs of all earlier blocks (section 3.1): `"standard"` (the plain
            sum), `"grn_v1"`, `"grn_v2"`, `"grn_v3"` or `"dca"`.
        last_k (`int`, *optional*):
            The `k` of k-DCA, for every scheme but `"standard"`: only the model's input and the last `k` outputs are
            kept apart, and those between are summed. `None` keeps all of them apart.
        grn_implementation (`str`, *optional*, defaults to `"auto"`):
            The implementation of the generalized residuals: `"eager"` (the reference), `"cpu"`, `"triton"` or another name
            in `modeling_dca.grn.ALL_GRN_FUNCTIONS`; `"auto"` is the best one for the device. Not saved with the model.
        norm_type (`str`, *optional*, defaults to `"rms_norm"`):
            `"rms_norm"`, `"layer_norm"` or `"zero_centered_rms_norm"` (an RMS norm whose weight is stored as its deviation
            from 1, as in Gemma).
        norm_eps (`float`, *optional*, defaults to 1e-6):
            The epsilon of all norms.
        gated_mlp (`bool`, *optional*, defaults to `False`):
            Whether the feed-forward module is gated (`down(act(gate(x)) * up(x))`, as in Llama) or plain
            (`down(act(up(x)))`).
        norm_placement (`str`, *optional*, defaults to `"pre"`):
            The placement of a block's norms, with `q` the input of the queries: `"pre"`, `a = attn(N1 q)` and
            `f = a + mlp(N2(q + a))`, as in the paper; `"sandwich"`, `a = P1(attn(N1 q))` and `f = a + P2(mlp(N2(q + a)))`,
            as in Gemma 2; or `"post_module"`, the latter without `N1` and `N2`, as in OLMo 2.
        parallel_blocks (`bool`, *optional*, defaults to `False`):
            Whether the feed-forward module sees `q` and not `q + a`, as in GPT-NeoX.
        qk_norm (`bool` or `str`, *optional*, defaults to `False`):
            Whether the heads of queries and keys are normalized (before the rotary embedding, if there is one);
            `"all_heads"` normalizes all heads together, as in OLMo 2.
        attention_scaling (`float`, *optional*):
            The factor of the products of queries and keys; `head_dim**-0.5` if not given.
        attention_softcap (`float`, *optional*):
            The limit of these products, `softcap * tanh(x / softcap)`, as in Gemma 2. PyTorch's `"sdpa"` attention does
            not support it; the default is then `"eager"`.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of the attention have a bias.
        attention_output_bias (`bool`, *optional*):
            Whether the attention's output projection has a bias; `attention_bias` if not given.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        mlp_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of the feed-forward module have a bias.
        source_config (`dict`, *optional*):
            The configuration of the residual model that this one was converted from, for the conversion back.

    Raises:
        `StrictDataclassError`: a field has the wrong type, or a value that does not fit the others.
    """

    _auto_class = "AutoConfig"
    #: For each Auto class, the class in the code that is saved with a checkpoint (`trust_remote_code`).
    _auto_map: ClassVar[dict[str, str]]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu"
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    residual_scheme: str = "dca"
    last_k: int | None = None
    grn_implementation: str = "auto"
    norm_type: str = "rms_norm"
    norm_eps: float | int = 1e-6
    gated_mlp: bool = False
    norm_placement: str = "pre"
    parallel_blocks: bool = False
    qk_norm: bool | str = False
    attention_scaling: float | int | None = None
    attention_softcap: float | int | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    source_config: dict | None = None

    def __post_init__(self, **kwargs):
        gate_norm = kwargs.pop("gate_norm", GATE_NORM)
        if gate_norm != GATE_NORM:
            raise ValueError(
                f"`gate_norm` is {gate_norm!r}, but the gates of this release have the norm {GATE_NORM!r}: load the model with "
                "the code in its checkpoint, or with the release of modeling-dca that saved it."
            )
        # Its name in release 0.1.
        self.source_config = kwargs.pop("residual_config", self.source_config)
        for name, value in self._following_fields().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        # A plan must not name modules that the model lacks.
        self.base_model_tp_plan = dict(type(self).base_model_tp_plan)
        if self.gated_mlp:
            self.base_model_tp_plan["layers.*.mlp.gate_proj"] = "colwise"
        if self.qk_norm == "all_heads":
            # Each process needs all heads for their norm.
            for name in ("q_proj", "k_proj", "v_proj"):
                self.base_model_tp_plan[f"layers.*.self_attn.{name}"] = "colwise_gather_output"
            self.base_model_tp_plan["layers.*.self_attn.o_proj"] = "rowwise_split_input"
        elif self.qk_norm:
            # Each process has some of the heads. All heads share one norm.
            self.base_model_tp_plan["layers.*.self_attn.q_norm"] = "replicated_with_grad_allreduce"
            self.base_model_tp_plan["layers.*.self_attn.k_norm"] = "replicated_with_grad_allreduce"
        super().__post_init__(**kwargs)
        self._is_made = True

    def __setattr__(self, key, value):
        # Fields that were derived from the old value are derived from the new one.
        followers = self._followers() if getattr(self, "_is_made", False) and key in self.own_fields() else ()
        super().__setattr__(key, value)
        for name in followers:
            if name != key:
                super().__setattr__(name, self._following_fields().get(name))

    def _followers(self) -> set[str]:
        """The names of the fields whose values are derived from others."""
        return {name for name, value in self._following_fields().items() if getattr(self, name) == value}

    def _following_fields(self) -> dict:
        """The values that are derived from other fields, for fields that are not given."""
        following = {"intermediate_size": 4 * self.hidden_size, "num_key_value_heads": self.num_attention_heads}
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0:
            following["head_dim"] = self.hidden_size // self.num_attention_heads
        return following

    @classmethod
    def own_fields(cls) -> set[str]:
        """The names of the fields that are not transformers' own, which every model has."""
        names = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        return {name for name in names if not name.startswith("_")}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As in transformers. Fields in `kwargs`, as `from_pretrained` takes them, are validated together with the others,
        and fields that were derived from `config_dict` are derived from them.
        """
        overrides = {name: kwargs.pop(name) for name in cls.own_fields() & kwargs.keys()}
        if not overrides:
            return super().from_dict(config_dict, **kwargs)
        saved = cls(**config_dict)
        fields = dict(overrides)
        rope_parameters = getattr(saved, "rope_parameters", None)
        if rope_parameters and isinstance(fields.get("rope_parameters"), dict):
            # Another type of rotary positions uses the model's frequencies.
            kept = {"rope_theta", "partial_rotary_factor"} & rope_parameters.keys()
            own = {name: rope_parameters[name] for name in kept}
            fields["rope_parameters"] = own | fields["rope_parameters"]
        fields = {name: value for name, value in config_dict.items() if name not in saved._followers()} | fields
        result = super().from_dict(fields, **kwargs)
        # Named in the error message if the weights do not fit.
        (result[0] if isinstance(result, tuple) else result)._overrides = overrides
        return result

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers. The modelling code is saved with it, so that the checkpoint loads without this library."""
        # (An empty `auto_map` means: do not save the code.)
        if getattr(self, "auto_map", None) != {}:
            self.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self):
        # PEFT asks for this before it looks the model's type up.
        name_in_peft(self.model_type)
        # The implementation depends on the machine, not on the checkpoint.
        output = super().to_dict()
        output.pop("grn_implementation", None)
        for name in ("_overrides", "_is_made"):
            output.pop(name, None)
        if getattr(RESIDUAL_SCHEMES.get(self.residual_scheme), "gated", False):
            output["gate_norm"] = GATE_NORM
        return output

    @property
    def max_stack_entries(self) -> int | None:
        """The most entries of a stack: 1 for the standard scheme, `last_k + 2` for k-DCA, `None` for no limit."""
        if self.residual_scheme == "standard":
            return 1
        return None if self.last_k is None else self.last_k + 2

    @property
    def num_residual_inputs(self) -> int:
        """The number of hidden states: the queries' input of each block, and the model's output."""
        return self.num_hidden_layers + 1

    def validate_architecture(self):
        """Part of `@strict`-powered validation. The error names the field, its value, and a value that would fit."""
        self._check_known("residual_scheme", RESIDUAL_SCHEMES)
        self._check_known("norm_type", ("rms_norm", "layer_norm", "zero_centered_rms_norm"))
        self._check_known("norm_placement", NORM_PLACEMENTS)
        if isinstance(self.qk_norm, str):
            self._check_known("qk_norm", ("all_heads",))
        self._check_known("hidden_act", ACT2FN)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            self._check_positive(name)
        for name in ("num_hidden_layers", "last_k"):
            self._check_positive(name)
        for name in ("attention_scaling", "attention_softcap"):
            self._check_above_zero(name)
        if self.norm_eps < 0:
            raise ValueError(f"`norm_eps` is {self.norm_eps}; it must be at least 0.")
        if not 0 <= self.attention_dropout <= 1:
            raise ValueError(f"`attention_dropout` is {self.attention_dropout}; it must be from 0 to 1.")
        if self.last_k is not None and self.residual_scheme == "standard":
            raise ValueError(
                f"`last_k` is {self.last_k}, but the 'standard' scheme sums all outputs: leave `last_k` out or choose "
                "another `residual_scheme`."
            )
        if self.head_dim is None:
            self._check_divides("hidden_size", "num_attention_heads")
        self._check_divides("num_attention_heads", "num_key_value_heads")

    def _check_known(self, field: str, known: Iterable[str]):
        value = getattr(self, field)
        if value not in known:
            raise ValueError(f"`{field}` is {value!r}; {nearest_name(value, known)}")

    def _check_positive(self, field: str):
        value = getattr(self, field)
        if value is not None and value < 1:
            raise ValueError(f"`{field}` is {value}; it must be at least 1.")

    def _check_above_zero(self, field: str):
        value = getattr(self, field)
        if value is not None and not value > 0:
            raise ValueError(f"`{field}` is {value}; it must be more than 0.")

    def _check_multiple(self, field: str, multiple: int, positions: str):
        value = getattr(self, field)
        if value % multiple:
            raise ValueError(f"`{field}` is {value}; {positions} positions need a multiple of {multiple}.")

    def _check_divides(self, field: str, divisor: str):
        value, by = getattr(self, field), getattr(self, divisor)
        if by < 1 or value % by:
            raise ValueError(f"`{field}` ({value}) is not a multiple of `{divisor}` ({by}).")


@strict
class DCAConfig(DCABaseConfig):
    r"""
    Configuration of the DCA text models. The defaults are the paper's 12-layer language model (section 5): no gating
    in the feed-forward module, an untied output embedding, rotary positions, 64-wide heads.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of tokens in the vocabulary.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            The maximum sequence length of the model, in tokens.
        position_embedding (`str`, *optional*, defaults to `"rope"`):
            `"rope"` (rotary, of the type in `rope_parameters`), `"learned"`, `"sincos"` (fixed sine and cosine) or
            `"none"`.
        rope_parameters (`dict`, *optional*):
            The type and the parameters of the rotary positions, as elsewhere in transformers; or a dictionary of these for
            each layer type, as in Gemma 3.
        no_rope_layers (`list[int]`, *optional*):
            For each layer, 1 if it has rotary positions and 0 otherwise, as in SmolLM3; all layers have them if not given.
        sliding_window (`int`, *optional*):
            The number of tokens that a sliding-window layer attends to.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer; if not given, all layers have sliding-window
            attention if `sliding_window` is set, and full attention otherwise.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its keys and values, for fast decoding.
        pad_token_id (`int`, *optional*):
            The id of the padding token.
        bos_token_id (`int`, *optional*):
            The id of the token that starts a text.
        eos_token_id (`int` or `list[int]`, *optional*):
            The id of the token that ends a text.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output embedding is the input embedding.
        embedding_multiplier (`float`, *optional*, defaults to 1.0):
            The factor of the token embeddings.
        logit_multiplier (`float`, *optional*, defaults to 1.0):
            The factor of the logits, as in Cohere.
        logit_softcap (`float`, *optional*):
            The limit of the logits, `softcap * tanh(x / softcap)`, as in Gemma 2.
        lm_head_bias (`bool`, *optional*, defaults to `False`):
            Whether the output embedding has a bias, as in Phi.
        cache_restart_length (`int`, *optional*):
            The length after which generation recomputes all keys and values, as their rotations change there, as in Phi-3.
        positions_by_mask (`bool`, *optional*, defaults to `False`):
            Whether default positions count only the tokens that the attention mask keeps, as in OPT.

    All other fields are those of [`DCABaseConfig`].

    Example:

    ```python
    >>> from modeling_dca import DCAConfig, DCAForCausalLM

    >>> configuration = DCAConfig(vocab_size=1000, hidden_size=64, num_attention_heads=4, num_hidden_layers=4, last_k=2)
    >>> model = DCAForCausalLM(configuration)
    ```
    """

    model_type = "dca"
    _auto_map = {
        "AutoConfig": "configuration_dca.DCAConfig",
        "AutoModel": "modeling_dca.DCAModel",
        "AutoModelForCausalLM": "modeling_dca.DCAForCausalLM",
        "AutoModelForSequenceClassification": "modeling_dca.DCAForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_dca.DCAForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_dca.DCAForQuestionAnswering",
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    position_embedding: str = "rope"
    rope_parameters: RopeParameters | dict | None = None
    no_rope_layers: list[int] | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    embedding_multiplier: float | int = 1.0
    logit_multiplier: float | int = 1.0
    logit_softcap: float | int | None = None
    lm_head_bias: bool = False
    cache_restart_length: int | None = None
    positions_by_mask: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.position_embedding != "rope":
            self.rope_parameters = None

    def convert_rope_params_to_dict(self, **kwargs) -> dict:
        """As in transformers, of which older releases also put a `rope_theta` beside parameters by layer type."""
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        if any(isinstance(value, dict) for value in self.rope_parameters.values()):
            self.rope_parameters = {
                name: value for name, value in self.rope_parameters.items() if isinstance(value, dict | None)
            }
        return kwargs

    @property
    def rope_parameters_by_type(self) -> dict[str | None, dict]:
        """The parameters of the rotary positions for each layer type in use, or under `None` for all."""
        if not set(self.layer_types) & self.rope_parameters.keys():
            return {None: self.rope_parameters}
        return {layer_type: self.rope_parameters[layer_type] for layer_type in dict.fromkeys(self.layer_types)}

    def _following_fields(self) -> dict:
        layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
        return super()._following_fields() | {"layer_types": [layer_type] * self.num_hidden_layers}

    def to_dict(self):
        # Layer types that are derived from `sliding_window` are not saved.
        output = super().to_dict()
        if "layer_types" in self._followers():
            output.pop("layer_types", None)
        return output

    def validate_architecture(self):
        super().validate_architecture()
        self._check_known("position_embedding", ("rope", "learned", "sincos", "none"))
        for name in ("vocab_size", "max_position_embeddings", "sliding_window", "cache_restart_length"):
            self._check_positive(name)
        for name in ("embedding_multiplier", "logit_multiplier", "logit_softcap"):
            self._check_above_zero(name)
        if self.position_embedding == "rope":
            self._check_multiple("head_dim", 2, "rotary")
            for rope_parameters in self.rope_parameters_by_type.values():
                rope_type = rope_parameters.get("rope_type")
                if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
                    raise ValueError(
                        f"`rope_parameters` has the `rope_type` {rope_type!r}; "
                        + nearest_name(rope_type, ("default", *ROPE_INIT_FUNCTIONS))
                    )
        if self.no_rope_layers is not None:
            if self.position_embedding != "rope":
                raise ValueError(
                    f"`no_rope_layers` is set, but `position_embedding` is {self.position_embedding!r}: leave it out."
                )
            if len(self.no_rope_layers) != self.num_hidden_layers or not set(self.no_rope_layers) <= {0, 1}:
                raise ValueError(
                    f"`no_rope_layers` is {self.no_rope_layers}; give a 0 or 1 for each of the {self.num_hidden_layers} "
                    "layers."
                )
        if self.position_embedding == "sincos":
            self._check_multiple("hidden_size", 2, "sine-cosine")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types)} entries, but `num_hidden_layers` is "
                f"{self.num_hidden_layers}; give one for each layer."
            )
        for layer_type in self.layer_types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"`layer_types` holds {layer_type!r}; {nearest_name(layer_type, ('full_attention', 'sliding_attention'))}"
                )
            if layer_type == "sliding_attention" and self.sliding_window is None:
                raise ValueError("`layer_types` holds 'sliding_attention', which needs `sliding_window` (an integer).")
        if self.sliding_window is not None and "sliding_attention" not in self.layer_types:
            raise ValueError(
                f"`sliding_window` is {self.sliding_window}, but `layer_types` holds no 'sliding_attention': leave one of "
                "them out."
            )


#: Fields of text models that would change a model's output. Vision models have nothing of the kind.
NOT_OF_IMAGES = ("sliding_window", "rope_parameters", "no_rope_layers")


@strict
class DCAVisionConfig(BackboneConfigMixin, DCABaseConfig):
    r"""
    Configuration of the DCA vision models. The defaults are ViT-S/16 with the plain recipe of Beyer et al. (2022) that
    the paper uses for ImageNet (table 8): global average pooling and fixed 2-D sine-cosine positions.

    Args:
        position_embedding (`str`, *optional*, defaults to `"sincos"`):
            `"sincos"` (fixed sine and cosine of row and column), `"learned"` or `"none"`.
        image_size (`int` or pair of `int`, *optional*, defaults to 224):
            Height and width of the images, in pixels.
        patch_size (`int` or pair of `int`, *optional*, defaults to 16):
            Height and width of a patch, in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of the images.
        pooling (`str`, *optional*, defaults to `"mean"`):
            The input of the classifier: `"mean"` (the average over the patches), `"cls"` (a class token before them),
            `"cls_mean"` (both, concatenated) or `"cls_registers"` (the class token and the registers, concatenated).
        num_register_tokens (`int`, *optional*, defaults to 0):
            Number of learned tokens between the class token and the patches.
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
            Whether images may have another size than `image_size` without the argument of this name, as in DINOv2.
        antialias_pos_encoding (`bool`, *optional*, defaults to `False`):
            Whether learned positions are smoothed when they are resampled for smaller images, as in DINOv2 with
            registers.
        out_features, out_indices (`list[str]`, `list[int]`, *optional*):
            The outputs of a backbone: `"stem"` (0, the embeddings), `"stage1"` (1, the output of block 1) and so on; the last
            one if not given. Either field determines the other.

    All other fields are those of [`DCABaseConfig`].

    Example:

    ```python
    >>> from modeling_dca import DCAForImageClassification, DCAVisionConfig

    >>> configuration = DCAVisionConfig(image_size=32, patch_size=8, hidden_size=64, num_attention_heads=4, num_labels=10)
    >>> model = DCAForImageClassification(configuration)
    ```
    """

    model_type = "dca_vision"
    _auto_map = {
        "AutoConfig": "configuration_dca.DCAVisionConfig",
        "AutoModel": "modeling_dca_vision.DCAVisionModel",
        "AutoModelForImageClassification": "modeling_dca_vision.DCAForImageClassification",
        "AutoBackbone": "modeling_dca_vision.DCAVisionBackbone",
    }
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    hidden_size: int = 384
    num_attention_heads: int = 6
    norm_type: str = "layer_norm"
    position_embedding: str = "sincos"
    attention_bias: bool = True
    mlp_bias: bool = True
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    pooling: str = "mean"
    num_register_tokens: int = 0
    interpolate_pos_encoding: bool = False
    antialias_pos_encoding: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)
        # The validation must see the fields that it refuses.
        refused = {name: kwargs[name] for name in NOT_OF_IMAGES if kwargs.get(name) is not None}
        super().__post_init__(**self._without_text_fields(kwargs), **refused)

    def to_dict(self):
        output = self._without_text_fields(super().to_dict())
        # The outputs of a backbone are saved only if they were set.
        return {name: value for name, value in output.items() if value is not None or not name.startswith("out_")}

    @property
    def stage_names(self) -> list[str]:
        """The names of what a backbone can return."""
        return ["stem", *(f"stage{index}" for index in range(1, self.num_residual_inputs))]

    @staticmethod
    def _without_text_fields(values: dict) -> dict:
        """Release 0.2 saved the fields of text models in vision configurations. The Trainer sets `use_cache` in any."""
        text = set(DCAConfig.__annotations__).difference(
            DCABaseConfig.__annotations__, DCAVisionConfig.__annotations__
        )
        return {name: value for name, value in values.items() if name not in text}

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the patches."""
        return int(self.pooling != "mean") + self.num_register_tokens

    @property
    def pooled_size(self) -> int:
        """Width of the classifier's input."""
        vectors = {"cls_mean": 2, "cls_registers": 1 + self.num_register_tokens}
        return self.hidden_size * vectors.get(self.pooling, 1)

    def validate_architecture(self):
        super().validate_architecture()
        self._check_known("pooling", ("mean", "cls", "cls_mean", "cls_registers"))
        self._check_known("position_embedding", ("learned", "sincos", "none"))
        self._check_positive("num_channels")
        if self.num_register_tokens < 0:
            raise ValueError(f"`num_register_tokens` is {self.num_register_tokens}; it must be at least 0.")
        for name in ("image_size", "patch_size"):
            sizes = _pair(getattr(self, name))
            if len(sizes) != 2 or min(sizes) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give one positive integer, or height and width.")
        for image, patch in zip(self.image_height_width, self.patch_height_width):
            # (Converted models may ignore the last pixels.)
            if image < patch or image % patch and self.source_config is None:
                raise ValueError(
                    f"`image_size` ({self.image_size}) is not a multiple of `patch_size` ({self.patch_size})."
                )
        if self.position_embedding == "sincos":
            self._check_multiple("hidden_size", 4, "2-D sine-cosine")
        for name in NOT_OF_IMAGES:
            if getattr(self, name, None) is not None:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; vision models attend to all patches, without rotary positions: "
                    "leave it out."
                )


def _pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, Iterable) else (size, size)


__all__ = ["DCABaseConfig", "DCAConfig", "DCAVisionConfig"]
