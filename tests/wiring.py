"""Which test sees the effect of each field of the configs, each argument, each flag.

A field is named here once: as a row of PROGRAMS or EXAMPLES, whose shared test tries the row's
value, or in CONFIG with the test of its own. `test_wiring.py` holds these tables against the code.
"""

from latent_diffusion.process.options import ALL_OPTIONS as SAMPLING

AUTOENCODER, DENOISER, CLASSIFIER = "autoencoding", "denoising", "classifying"
PRIOR, STUDENT = "prior", "distillation"
MASKED = {"transformer.causal": False}
VQ = {"autoencoder.regularization": "vq", "autoencoder.num_codes": 4}
GUMBEL = {"autoencoder.regularization": "gumbel", "autoencoder.num_codes": 4}
ATTENTION = {"autoencoder.attn_resolutions": (8,), "autoencoder.resolution": 8}
LINEAR = {"diffusion.schedule": "linear"}
COSINE = {"optimizer.schedule": "cosine"}
LPIPS = {"autoencoding.perceptual": "alex", "data.image_size": 32}
SIXTEEN = {"data.image_size": 16}
EIGHT = {"autoencoder.resolution": 8}
VECTOR = {"conditioners": {"class_label": {"num_classes": 3, "width": 32, "route": "vector"}}}
LORA = {"lora.rank": 1}
DIT = {"backbone": "dit", "dit.width": 8, "dit.depth": 1, "dit.num_heads": 2}
VARIANCE = {**DIT, "dit.learned_variance": True}
MMDIT = {"backbone": "mmdit", "mmdit.width": 8, "mmdit.depth": 1, "mmdit.num_heads": 2}
MMDIT |= {"mmdit.max_positions": 8}

# field -> (task, part of it, a value, what else is set): the program that the task traces with this
# value is another one than with that of tests/tiny.py. Parts: a method, an optimiser ("tx"), or the
# autoencoder in training.
PROGRAMS = {
    "task": (DENOISER, "train_step", CLASSIFIER, {"classifier.pool": "spatial"}),
    "batch_size": (DENOISER, "train_step", 4, {}),
    "grad_accumulation": (DENOISER, "train_step", 2, {}),
    "num_steps": (DENOISER, "tx", 7, COSINE),
    "ema_decay": (DENOISER, "train_step", 0.8, {}),
    "conditioners": (DENOISER, "train_step", {}, {}),
    "pretrained": (DENOISER, "train_step", {"text": "here"}, {}),
    "autoencoder.attn_resolutions": (
        AUTOENCODER,
        "autoencoder",
        (8,),
        {"autoencoder.resolution": 8},
    ),
    "autoencoder.attn_type": (AUTOENCODER, "autoencoder", "linear", ATTENTION),
    "autoencoder.channel_mult": (AUTOENCODER, "autoencoder", (1, 2), {}),
    "autoencoder.channels": (AUTOENCODER, "autoencoder", 8, {}),
    "autoencoder.codebook_beta": (AUTOENCODER, "autoencoder", 0.5, VQ),
    "autoencoder.codebook_ema_decay": (AUTOENCODER, "autoencoder", 0.9, VQ),
    "autoencoder.codebook_l2": (AUTOENCODER, "autoencoder", True, VQ),
    "autoencoder.codebook_legacy": (AUTOENCODER, "autoencoder", False, VQ),
    "autoencoder.codebook_restart_below": (
        *(AUTOENCODER, "train_step", 0.5, {**VQ, "autoencoder.codebook_ema_decay": 0.9}),
    ),
    "autoencoder.dropout": (AUTOENCODER, "autoencoder", 0.1, {}),
    "autoencoder.dtype": (AUTOENCODER, "autoencoder", "bfloat16", {}),
    "autoencoder.embed_dim": (AUTOENCODER, "autoencoder", 3, {}),
    "autoencoder.gumbel_kl_weight": (AUTOENCODER, "autoencoder", 0.1, GUMBEL),
    "autoencoder.gumbel_straight_through": (AUTOENCODER, "autoencoder", False, GUMBEL),
    "autoencoder.image_channels": (AUTOENCODER, "eval_step", 1, {}),
    "autoencoder.num_codes": (AUTOENCODER, "autoencoder", 5, VQ),
    "autoencoder.num_groups": (AUTOENCODER, "autoencoder", 2, {}),
    "autoencoder.num_res_blocks": (AUTOENCODER, "autoencoder", 2, {}),
    "autoencoder.regularization": (AUTOENCODER, "autoencoder", "none", {}),
    "autoencoder.remat": (AUTOENCODER, "train_step", True, {}),
    "autoencoder.resolution": (AUTOENCODER, "autoencoder", 16, ATTENTION),
    "autoencoder.tanh_out": (AUTOENCODER, "autoencoder", True, {}),
    "autoencoder.z_channels": (AUTOENCODER, "autoencoder", 3, {}),
    "autoencoding.adversarial_ramp": (AUTOENCODER, "train_step", 5, {}),
    "autoencoding.adversarial_start": (AUTOENCODER, "train_step", 7, {}),
    "autoencoding.adversarial_weight": (AUTOENCODER, "train_step", 0.3, {}),
    "autoencoding.disc_learning_rate": (AUTOENCODER, "disc_tx", 0.25, {}),
    "autoencoding.disc_loss": (AUTOENCODER, "train_step", "vanilla", {}),
    "autoencoding.disc_start": (AUTOENCODER, "train_step", 7, {}),
    "autoencoding.discriminator.channels": (AUTOENCODER, "train_step", 8, {}),
    "autoencoding.discriminator.norm": (AUTOENCODER, "train_step", "actnorm", {}),
    "autoencoding.discriminator.num_layers": (
        AUTOENCODER,
        "train_step",
        2,
        {"data.image_size": 16},
    ),
    "autoencoding.gumbel_temperature": (AUTOENCODER, "train_step", (1.0, 0.5), GUMBEL),
    "autoencoding.learn_logvar": (AUTOENCODER, "train_step", False, {}),
    "autoencoding.logvar_init": (AUTOENCODER, "init", 0.5, {}),
    "autoencoding.perceptual": (AUTOENCODER, "eval_step", "alex", {"data.image_size": 32}),
    "autoencoding.perceptual_weight": (AUTOENCODER, "train_step", 0.5, LPIPS),
    "autoencoding.reduction": (AUTOENCODER, "train_step", "mean", {}),
    "autoencoding.reg_weight": (AUTOENCODER, "train_step", 0.5, {}),
    "backbone": (DENOISER, "eval_step", "unet", DIT),
    "dit.attention": (DENOISER, "eval_step", "xla", {**DIT, "dit.attention": "auto"}),
    "dit.base_size": (DENOISER, "eval_step", 16, DIT),
    "dit.depth": (DENOISER, "eval_step", 2, DIT),
    "dit.dtype": (DENOISER, "eval_step", "bfloat16", DIT),
    "dit.frequency_shift": (DENOISER, "eval_step", 1, DIT),
    "dit.learned_variance": (DENOISER, "eval_step", True, DIT),
    "dit.mlp_norm_eps": (DENOISER, "eval_step", 1e-5, DIT),
    "dit.mlp_ratio": (DENOISER, "eval_step", 2.0, DIT),
    "dit.num_heads": (DENOISER, "eval_step", 1, DIT),
    "dit.patch_size": (DENOISER, "eval_step", 1, DIT),
    "dit.remat": (DENOISER, "train_step", "full", DIT),
    "dit.scan": (DENOISER, "eval_step", True, {**DIT, "dit.depth": 2}),
    "dit.sit": (DENOISER, "eval_step", True, DIT),
    "dit.width": (DENOISER, "eval_step", 16, DIT),
    "mmdit.attention": (DENOISER, "eval_step", "xla", MMDIT),
    "mmdit.base_size": (DENOISER, "init", 16, MMDIT),
    "mmdit.depth": (DENOISER, "eval_step", 2, MMDIT),
    "mmdit.dtype": (DENOISER, "eval_step", "bfloat16", MMDIT),
    "mmdit.dual_attention": (DENOISER, "eval_step", (0,), MMDIT),
    "mmdit.max_positions": (DENOISER, "eval_step", 16, MMDIT),
    "mmdit.mlp_ratio": (DENOISER, "eval_step", 2.0, MMDIT),
    "mmdit.num_heads": (DENOISER, "eval_step", 1, MMDIT),
    "mmdit.patch_size": (DENOISER, "eval_step", 1, MMDIT),
    "mmdit.qk_norm": (DENOISER, "eval_step", True, MMDIT),
    "mmdit.remat": (DENOISER, "train_step", "full", MMDIT),
    "mmdit.scan": (DENOISER, "eval_step", True, {**MMDIT, "mmdit.depth": 3}),
    "mmdit.width": (DENOISER, "eval_step", 16, MMDIT),
    "unet.attention": (DENOISER, "eval_step", "xla", {"unet.attention": "auto"}),
    "unet.attention_resolutions": (DENOISER, "eval_step", (1,), {}),
    "unet.channel_mult": (DENOISER, "eval_step", (2,), {}),
    "unet.disable_self_attentions": (DENOISER, "eval_step", (True,), {}),
    "unet.dropout": (DENOISER, "train_step", 0.1, {}),
    "unet.dtype": (DENOISER, "eval_step", "bfloat16", {}),
    "unet.legacy_qkv_order": (DENOISER, "eval_step", False, {"unet.transformer_depth": 0}),
    "unet.scan": (DENOISER, "eval_step", True, {"unet.transformer_depth": 2}),
    "unet.middle_depth": (DENOISER, "eval_step", 2, {}),
    "unet.model_channels": (DENOISER, "eval_step", 16, {}),
    "unet.num_groups": (DENOISER, "eval_step", 2, {}),
    "unet.num_head_channels": (DENOISER, "eval_step", 2, {}),
    "unet.num_heads": (DENOISER, "eval_step", 1, {}),
    "unet.num_res_blocks": (DENOISER, "eval_step", 2, {}),
    "unet.remat": (DENOISER, "train_step", "full", {}),
    "unet.resblock_updown": (DENOISER, "eval_step", True, {"unet.channel_mult": (1, 1)}),
    "unet.transformer_depth": (DENOISER, "eval_step", 2, {}),
    "unet.use_scale_shift_norm": (DENOISER, "eval_step", False, {}),
    "unet.vector_projection": (DENOISER, "eval_step", True, VECTOR),
    "diffusion.beta_end": (DENOISER, "eval_step", 0.02, LINEAR),
    "diffusion.beta_start": (DENOISER, "eval_step", 0.001, LINEAR),
    "diffusion.variance_weight": (DENOISER, "train_step", 0.001, VARIANCE),
    "diffusion.drop_rate": (DENOISER, "train_step", 0.25, {}),
    "diffusion.elbo_weight": (DENOISER, "train_step", 0.25, {}),
    "diffusion.input_perturbation": (DENOISER, "train_step", 0.25, {}),
    "diffusion.learn_logvar": (DENOISER, "train_step", True, {}),
    "diffusion.loss": (DENOISER, "train_step", "l1", {}),
    "diffusion.huber_c": (DENOISER, "train_step", 0.25, {"diffusion.loss": "pseudo_huber"}),
    "diffusion.loss_weight": (DENOISER, "train_step", "min_snr", {}),
    "diffusion.num_timesteps": (DENOISER, "train_step", 500, {}),
    "diffusion.offset_noise": (DENOISER, "train_step", 0.25, {}),
    "diffusion.prediction": (DENOISER, "train_step", "eps", {}),
    "diffusion.schedule": (DENOISER, "train_step", "sqrt", {}),
    "diffusion.max_noise": (DENOISER, "train_step", 0.2, {}),
    "diffusion.timestep_sampling": (DENOISER, "train_step", "logit_normal", {}),
    "diffusion.shift": (DENOISER, "train_step", 3.0, {}),
    "diffusion.zero_terminal_snr": (DENOISER, "train_step", True, LINEAR),
    "distillation.distilled_steps": (STUDENT, "train_step", 25, {}),
    "distillation.guidance_scales": (STUDENT, "train_step", (1.0, 3.0), {}),
    "distillation.method": (STUDENT, "train_step", "guidance", {}),
    "distillation.phases": (STUDENT, "train_step", 2, {}),
    "distillation.target_decay": (STUDENT, "train_step", 0.5, {}),
    "unet.guidance_dim": (STUDENT, "train_step", 4, {}),
    "classifier.num_classes": (CLASSIFIER, "eval_step", 5, {}),
    "classifier.pool": (CLASSIFIER, "eval_step", "spatial", {}),
    "sampling.distilled_steps": (
        *(DENOISER, "show", 20, {"sampling.sampler": "lcm", "sampling.spacing": "lcm"}),
    ),
    "sampling.eta": (DENOISER, "show", 0.5, {}),
    "sampling.guidance_scale": (DENOISER, "show", 3.5, {}),
    "sampling.guidance_channels": (DENOISER, "show", 1, {"sampling.guidance_scale": 3.5}),
    "sampling.learned_variance": (DENOISER, "show", True, {**VARIANCE, "sampling.sampler": "ddpm"}),
    "sampling.num_steps": (DENOISER, "show", 3, {}),
    "sampling.sampler": (DENOISER, "show", "heun", {}),
    "sampling.shift": (DENOISER, "show", 3.0, {"sampling.spacing": "shifted"}),
    "sampling.spacing": (DENOISER, "show", "leading", {}),
    "transformer.attention": (PRIOR, "eval_step", "xla", MASKED),
    "transformer.causal": (PRIOR, "eval_step", False, {}),
    "transformer.depth": (PRIOR, "eval_step", 2, {}),
    "transformer.dropout": (PRIOR, "train_step", 0.2, {}),
    "transformer.dtype": (PRIOR, "eval_step", "bfloat16", {}),
    "transformer.max_length": (PRIOR, "init", 66, {}),
    "transformer.num_heads": (PRIOR, "eval_step", 4, {}),
    "transformer.remat": (PRIOR, "train_step", True, {}),
    "transformer.vocab_size": (PRIOR, "init", 30, {}),
    "transformer.width": (PRIOR, "eval_step", 8, {}),
    "prior.drop_rate": (PRIOR, "train_step", 0.25, {}),
    "prior.label_smoothing": (PRIOR, "train_step", 0.25, {}),
    "prior.min_masked": (PRIOR, "train_step", 0.25, MASKED),
    "prior.pkeep": (PRIOR, "train_step", 0.75, {}),
    "prior.sampling.choice_temperature": (PRIOR, "show", 2.5, MASKED),
    "prior.sampling.guidance_scale": (PRIOR, "show", 3.5, {}),
    "prior.sampling.num_steps": (PRIOR, "show", 3, MASKED),
    "prior.sampling.temperature": (PRIOR, "show", 0.5, {}),
    "prior.sampling.top_k": (PRIOR, "show", 3, {}),
    "prior.sampling.top_p": (PRIOR, "show", 0.5, {}),
    "optimizer.averages": (CLASSIFIER, "tx", (0.1,), {}),
    "optimizer.b1": (CLASSIFIER, "tx", 0.8, {}),
    "optimizer.b2": (CLASSIFIER, "tx", 0.8, {}),
    "optimizer.end_factor": (CLASSIFIER, "tx", 0.5, COSINE),
    "optimizer.eps": (CLASSIFIER, "tx", 0.5, {}),
    "optimizer.frozen": (CLASSIFIER, "tx", ("bias",), {}),
    "optimizer.grad_clip": (CLASSIFIER, "tx", 0.5, {}),
    "optimizer.learning_rate": (CLASSIFIER, "tx", 0.5, {}),
    "optimizer.name": (CLASSIFIER, "tx", "adam", {}),
    "optimizer.no_decay": (CLASSIFIER, "tx", ("bias",), {}),
    "optimizer.schedule": (CLASSIFIER, "tx", "linear", COSINE),
    "optimizer.warmup_steps": (CLASSIFIER, "tx", 5, {}),
    "optimizer.weight_decay": (CLASSIFIER, "tx", 0.5, {}),
    "textual_inversion.num_vectors": (
        DENOISER,
        "train_step",
        2,
        {"textual_inversion.word": "<it>"},
    ),
    "textual_inversion.word": (DENOISER, "train_step", "<it>", {}),
    "control": (DENOISER, "train_step", "edges", {"first_stage.cache": False}),
    "lora.alpha": (DENOISER, "train_step", 2.5, LORA),
    "lora.kind": (DENOISER, "train_step", "dora", LORA),
    "lora.rank": (DENOISER, "train_step", 1, {}),
    "lora.targets": (DENOISER, "train_step", (r"unet/.*attn1/to_q",), LORA),
}

LAYOUT = {"layout.vocab_size": 30, "layout.max_objects": 3}
# field of `data` -> (a value, what else is set): it changes what the transform of training makes of
# a picture of 24 × 12 with its boxes and labels.
EXAMPLES = {
    "crop": ("squash", {}),
    "flip": (True, {}),
    "image_size": (4, {}),
    "shorter_side": (10, {"crop": "center"}),
    "low_res": ("bicubic", {}),
    "low_res_factor": (2, {"low_res": "bicubic"}),
    "mask": ("boxes", {}),
    "sizes": (True, {}),
    "layout.vocab_size": (40, LAYOUT),
    "layout.max_objects": (2, LAYOUT),
    "layout.encode_crop": (False, LAYOUT),
    "layout.centres": (True, LAYOUT),
}

HERE = "test_wiring.py::test_"
TEACHER = "test_distillation.py::test_a_student_starts_as_its_teacher_and_goes_on_without_it"
PREVIEW = "test_preview.py::test_both_halves_learn_the_latents_of_the_frozen_first_stage"
PERCEPTUAL = f"{HERE}a_run_reads_the_perceptual_weights_that_the_config_names"
CONDITIONAL = "test_codebooks.py::test_conditional_discriminator_sees_the_condition"
TRAINED = "test_commands.py::test_load_gives_a_model_that_encodes_decodes_and_samples"
LOOP = f"{HERE}events_of_the_loop_come_when_the_config_says"
SCALE = f"{HERE}the_latent_scale_is_that_of_the_batches_that_the_config_says"
START = f"{HERE}a_run_starts_on_its_mesh_from_its_seed_and_with_latents_if_it_caches_them"
DISTANCE = f"{HERE}a_distance_is_over_so_many_pictures_and_of_the_features_that_the_config_names"
TOKENIZER = f"{HERE}the_tokenizer_is_the_one_that_the_config_describes"
EMBEDDED = "test_clip.py::test_a_data_set_is_embedded_once_and_for_all"
AVERAGES = "test_averages.py::test_a_run_saves_snapshots_of_which_a_command_makes_a_workdir"
CONFIG = {
    "textual_inversion.start": "test_words.py::test_training_moves_the_new_rows_alone_bitwise",
    "distillation.teacher": TEACHER,
    "dreambooth.class_prompt": "test_dreambooth.py::test_pictures_of_the_class_are_drawn_once",
    "dreambooth.num_images": "test_dreambooth.py::test_pictures_of_the_class_are_drawn_once",
    "dreambooth.prior_weight": "test_dreambooth.py::test_a_loss_is_of_both_halves",
    "autoencoding.disc_condition": CONDITIONAL,
    "autoencoding.perceptual_path": PERCEPTUAL,
    "checkpoint.averages_every_steps": AVERAGES,
    "cache_texts": "test_texts.py::test_a_run_reads_its_captions_once",
    "checkpoint.best": LOOP,
    "checkpoint.best_mode": LOOP,
    "checkpoint.every_steps": LOOP,
    "checkpoint.keep": LOOP,
    "data.balance": "test_balance.py::test_training_draws_small_classes_more_often",
    "data.bucket_step": "test_buckets.py::test_every_batch_has_pictures_of_one_bucket",
    "data.caption_column": "test_image_folder.py::test_the_column_of_captions_has_a_name",
    "data.dir": "test_image_folder.py::test_split_and_class_folders",
    "data.embedding": EMBEDDED,
    "data.embedding_path": EMBEDDED,
    "data.features": "test_tfds.py::test_configured_features",
    "data.name": "test_image_folder.py::test_split_and_class_folders",
    "data.num_neighbours": EMBEDDED,
    "data.search": f"{HERE}neighbours_are_searched_for_by_the_name_in_the_config",
    "data.test_fraction": "test_image_folder.py::test_hash_split_is_a_partition_that_files_keep",
    "data.test_split": "test_tfds.py::test_usual_features_are_found",
    "data.train_split": "test_tfds.py::test_configured_features",
    "data.workers": f"{HERE}a_run_learns_from_one_split_and_is_evaluated_on_the_other",
    "first_stage.cache": START,
    "first_stage.normalization": SCALE,
    "first_stage.num_batches": SCALE,
    "first_stage.autoencoder": PREVIEW,
    "first_stage.path": TRAINED,
    "first_stage.trained_by": "test_start.py::test_a_missing_first_stage_is_named_with_its_command",
    "init_from": "test_init_from.py::test_the_whole_model_and_its_average_start_from_the_file",
    "init_from_changes": "test_init_from.py::test_the_first_stage_comes_along_with_its_scale",
    "init_from_only": "test_init_from.py::test_a_part_by_its_path",
    "log.distance": DISTANCE,
    "log.distance_images": DISTANCE,
    "log.distance_path": DISTANCE,
    "log.eval_batches": f"{HERE}an_evaluation_is_the_mean_over_its_batches_without_the_padding",
    "log.eval_every_steps": LOOP,
    "log.every_steps": LOOP,
    "log.images_every_steps": LOOP,
    "log.num_images": f"{HERE}a_drawing_has_as_many_pictures_as_the_config_says",
    "parallel.mesh.data": START,
    "parallel.mesh.fsdp": START,
    "parallel.mesh.tensor": START,
    "parallel.mode": START,
    "parallel.rules": START,
    "seed": START,
    "tokenizer.max_length": TOKENIZER,
    "tokenizer.name": TOKENIZER,
    "tokenizer.path": TOKENIZER,
    "tokenizer.vocab_size": TOKENIZER,
}

ANCESTRAL = {"sampler": "dpm_solver_pp_2m_sde"}
KARRAS = {"spacing": "karras"}
LCM = {"sampler": "lcm", "num_steps": 4}
# option or argument of Model.sample -> (a value, what else is given): it changes the pictures.
OPTIONS = {
    "sampler": ("euler_ancestral", {}),
    "num_steps": (3, {}),
    "spacing": ("leading", {}),
    "last": (0, {}),
    "offset": (1, {"spacing": "leading"}),
    "rho": (3.0, KARRAS),
    "within": ("leading", KARRAS),
    "sigma_min": (0.5, KARRAS),
    "sigma_max": (5.0, KARRAS),
    "start": (0.5, {"z_T": "noise"}),
    "end": (0.5, {}),
    "spread": ("sigma", {"spacing": "given", "timesteps": (400, 300, 200, 100)}),
    "distilled_steps": (20, {**LCM, "spacing": "lcm"}),
    "shift": (3.0, {"spacing": "shifted"}),
    "timesteps": ((900, 500, 300, 100), {"spacing": "given", "timesteps": (900, 600, 300, 100)}),
    "guidance_scale": (2.0, {}),
    "guidance_interval": ((0, 500), {}),
    "guidance_rescale": (0.5, {}),
    "guidance_channels": (1, {"guidance_scale": 3.0}),
    "cfg_pp": (True, {"guidance_scale": 0.5}),
    "perpendicular": (1.5, {"negative_prompts": ["cat"]}),
    "clip_x0": (0.3, {}),
    "dynamic_threshold": (0.5, {}),
    "threshold_limit": (1.01, {"dynamic_threshold": 0.5}),
    "strength": (0.3, {"image": "image", "strength": 0.9}),
    "eta": (1.0, {}),
    "temperature": (0.5, {"eta": 1.0}),
    "noise_dropout": (0.5, {"eta": 1.0}),
    "large_variance": (1.0, {"sampler": "ddpm"}),
    "timestep_scaling": (0.001, LCM),
    "sigma_data": (1e4, LCM),
    "order": (1, {"sampler": "unipc"}),
    "solver_type": ("heun", ANCESTRAL),
    "lower_order_final": (False, {"sampler": "unipc"}),
    "euler_at_final": (True, {**ANCESTRAL, "last": 0, "lower_order_final": False}),
    "disable_corrector": ((0,), {"sampler": "unipc"}),
    "extrapolated": ("v", {"sampler": "plms"}),
    "negative_prompts": (["cat"], {}),
    "more_prompts": ([("cat", 0.5)], {}),
    "image": ("other image", {"image": "image", "strength": 0.5}),
    "mask": ("no hole", {"image": "image", "strength": 0.5}),
    "num_images": (2, {}),
    "image_size": ((4, 8), {}),
    "z_T": ("noise", {}),
}

ANSWERS = "test_answers.py::test_"
TOLD = f"{ANSWERS}a_condition_reaches_the_network"
OPPOSITE = f"{ANSWERS}the_unconditional_may_have_other_sizes"
VARIANCES = "test_learned_variance.py::test_"
GUIDE = f"{ANSWERS}a_guide_changes_the_pictures"
ADAPTERS = "test_adapters.py::test_sampling_with_adapters_is_sampling_with_the_merged_model"
BATCHES = "test_model.py::test_a_call_runs_one_program_for_each_batch"
CODES = "test_codebooks.py::test_large_and_odd_images_go_through_the_model"
DRAWN = "test_codebooks.py::test_latents_are_drawn_with_a_key_and_likeliest_without"
SCALES = "test_answers.py::test_the_guided_answer_is_decoded"
CLASSES = f"{ANSWERS}classes_and_their_null"
TILES = "test_model.py::test_large_pictures_are_made_in_tiles"
HOLE = "test_model.py::test_inpainting_keeps_every_pixel_outside_the_hole_and_reports_its_steps"
WEIGHTS = "test_prompts.py::test_weights_reach_the_pictures_and_plain_prompts_stay_as_they_are"
PULLS = "test_conditions.py::test_a_picture_to_resemble_pulls_samples_and_bad_guides_are_named"
DRAWS = "test_prior_model.py::test_an_option_of_a_prior_changes_the_pictures"
LOGITS = "test_prior_model.py::test_logits_of_codes_under_a_condition"
# Method of Model -> its arguments and options that are no rows of OPTIONS.
ARGUMENTS = {
    "sample": {
        "rng": f"{ANSWERS}another_key_gives_other_pictures",
        "prompts": SCALES,
        "class_labels": CLASSES,
        **dict.fromkeys(("layout", "segmentation", "low_res", "noise_level"), TOLD),
        **dict.fromkeys(("depth", "neighbours", "image_embedding"), TOLD),
        **dict.fromkeys(("original_size", "crop_top_left", "target_size", "aesthetic_score"), TOLD),
        **dict.fromkeys(("negative_original_size", "negative_crop_top_left"), OPPOSITE),
        **dict.fromkeys(("negative_target_size", "negative_aesthetic_score"), OPPOSITE),
        "learned_variance": f"{VARIANCES}guidance_leaves_the_variance_and_the_other_channels_to_"
        "the_condition",
        **dict.fromkeys(("classifier", "classifier_labels", "classifier_scale"), GUIDE),
        **dict.fromkeys(("target", "target_scale"), GUIDE),
        "target_distance": PULLS,
        **dict.fromkeys(("top_k", "top_p", "choice_temperature"), DRAWS),
        "quantize_x0": "test_model.py::test_bad_input_is_one_line",
        "network_timesteps": "test_denoiser.py::test_the_network_sees_whole_timesteps",
        "tile_size": TILES,
        "tile_overlap": TILES,
        "adapters": ADAPTERS,
        "controls": "test_control.py::test_weights_windows_and_blocks_are_inputs_of_one_program",
        "refiner": f"{ANSWERS}a_call_with_a_refiner_is_two_calls_bitwise",
        "image_prompts": "test_image_prompts.py::test_all_kinds_are_inputs_of_one_program",
        "batch_size": BATCHES,
        "mode": BATCHES,
        "progress": HOLE,
        "prompt_weights": WEIGHTS,
        "preview": f"{ANSWERS}previews_are_estimates_of_the_latents",
    },
    "logits": {"codes": LOGITS, "conditioning": LOGITS},
    "encode": {"images": CODES, "rng": DRAWN, "tile_size": CODES, "tile_overlap": CODES},
    "decode": {"latents": SCALES, "size": CODES, "tile_size": CODES, "tile_overlap": CODES},
    "condition": {
        "prompts": SCALES,
        "class_labels": CLASSES,
        "image_size": f"{ANSWERS}a_condition_has_the_size_of_the_picture",
        "rng": TOLD,
        "prompt_weights": "test_prompts.py::test_a_condition_has_the_weights",
        "values": TOLD,
    },
}

CLUSTER = ("distributed", "coordinator", "num_processes", "process_id", "connect_timeout")
TOGETHER = "test_processes.py::test_processes_that_differ_or_are_alone_refuse_to_start"
RUNS = "test_commands.py::test_a_workdir_holds_what_the_readme_says"
CALL = "test_flags.py::test_what_is_written_behind_{}_reaches_the_call"
# Module of a command -> its flags. What a call makes of its arguments has tests above.
FLAGS = {
    "latent_diffusion.training.__main__": {
        "config": RUNS,
        "workdir": RUNS,
        "dry_run": "test_commands.py::test_dry_run_counts_parameters_without_data_or_workdir",
        **dict.fromkeys(CLUSTER, TOGETHER),
    },
    "latent_diffusion.generation.__main__": {
        **dict.fromkeys(
            (
                *("workdir", "model", "tokenizer", "lora", "adapter", "control", "refiner"),
                *("image_prompt", "image_encoder", "out", "prompts", "dtype", "scan"),
                *("prompts_file", "class_labels", "num_images", "seed"),
                *(name for name, option in SAMPLING.items() if option.flag),
                *("negative_prompts", "more_prompts", "image", "mask", "layout", "segmentation"),
                *("low_res", "noise_level", "depth", "neighbours", "image_embedding"),
                *("original_size", "crop_top_left", "target_size", "aesthetic_score"),
                *("negative_original_size", "negative_crop_top_left", "negative_target_size"),
                "negative_aesthetic_score",
                *("progress", "batch_size", "height", "width", "prompt_weights"),
            ),
            CALL.format("sample"),
        ),
        **dict.fromkeys(CLUSTER, TOGETHER),
    },
    "latent_diffusion.evaluate.__main__": {
        **dict.fromkeys(
            (
                *("workdir", "samples", "reference", "metrics", "num_images", "features"),
                *("features_path", "filter", "clip_path", "lpips", "split", "image_size", "seed"),
                *("batch_size", "sampler", "num_steps", "guidance_scale"),
                *("save_images", "save_reference"),
            ),
            CALL.format("evaluate"),
        ),
        **dict.fromkeys(CLUSTER, TOGETHER),
    },
    "latent_diffusion.convert.__main__": dict.fromkeys(
        ("to", "dtype", "config", "tokenizer", "lora", "variant", "ema", "dry_run"),
        CALL.format("convert"),
    ),
    "latent_diffusion.serve.__main__": dict.fromkeys(
        (
            *("workdir", "model", "tokenizer", "adapter", "image_encoder", "host", "port", "token"),
            *(
                "dtype",
                "scan",
                "max_images",
                "max_waiting",
                "max_pixels",
                "max_steps",
                "batch_size",
            ),
        ),
        CALL.format("serve"),
    ),
    "latent_diffusion.encode": {
        **dict.fromkeys(
            ("config", "out", "dtype", "crops", "shard_size", "splits"), CALL.format("encode")
        ),
        **dict.fromkeys(CLUSTER, TOGETHER),
    },
    "latent_diffusion.compile_check": dict.fromkeys(
        ("config", "topology", "programs", "compile", "quick", "params", "json"),
        CALL.format("compile_check"),
    ),
    "latent_diffusion.training.plan": dict.fromkeys(
        ("config", "topology", "images", "images_per_core", "picture_kb", "storage_rate", "facts"),
        CALL.format("plan"),
    ),
}
