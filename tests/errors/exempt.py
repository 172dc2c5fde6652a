"""Public names without wrong calls of their own, by reason; all others have some in the tables."""

_NODE = "a NamedTuple, a node of pytrees that also holds masks, labels and shapes: what works on it checks it"
_ANSWER = "made by the package, to be read"
_ASKS = "answers for any object"
_INNER = "a part of the step: its arguments are those of kernels that tdlrt has checked"
_CHECKED = "given a geometry that resolve has checked"
_DERIVED = "computed from a model that the caller has checked"
_STORED = "a part of save and restore, which check what they are given"
_CHECKER = "a check itself, with the argument's name as an argument: tests/errors shows it through its callers"
_RAISED = "an error to be raised"
_NOTHING = "takes no arguments"

REASONS = {
    _NODE: (
        *("tucker.TuckerTensor", "frame.Frame", "ranks.RankPolicy", "baselines.cp.CPTensor", "paths.KernelTree"),
        *("conv.geometry.Geometry", "conv.onepass.Tap", "conv.stages.Application", "conv.onepass.Applied"),
        *(f"conv.normalization.{n}" for n in ("Normalized", "OutputGradient", "Saved")),
        *("dynamics.flows.Flow", "dynamics.flows.MovingFrame", "dynamics.momentum.Rolling", "budget.Plan"),
    ),
    _ANSWER: (
        *("step.StepInfo", "optimizer.TdlrtState", "baselines.pruning.PrunedState", "baselines.pruning.PruningRound"),
        *("conv.plans.Work", "dynamics.step.FlowStepInfo", "dynamics.solve.Statistics", "dynamics.solve.Trajectory"),
        *("report.LayerSummary", "report.Summary", "report.Total", "truncation.Truncated", "budget.BudgetState"),
        *("galerkin.SecondGradient", "gradients.Evaluated", "sensitivity.Sensitivity"),
    ),
    _ASKS: (
        *("tucker.is_tucker", "baselines.cp.is_cp", "baselines.pruning.weights_of_layers", "arguments.shown"),
        *(
            "rules.rule_for",
            "rules.layer_path",
            "paths.path_name",
            "paths.flatten_kernels",
            "paths.masked_paths",
            "paths.kernels_in_parts",
        ),
    ),
    _INNER: (
        *("budget.allowed", "budget.fit_ranks", "budget.initial_state", "budget.mode_energies", "control.RankControl"),
        *(
            f"conv.normalization.{n}"
            for n in ("normalize", "normalize_dense", "normalize_in_reverse", "normalize_pullback")
        ),
        *(f"sensitivity.{n}" for n in ("average", "cost_per_rank", "known", "measure", "start")),
        *("conv.onepass.apply_normalized", "conv.onepass.core_cotangent", "conv.rows.contract_rows"),
        *(f"conv.stages.{n}" for n in ("reduce", "convolve_merged", "correlate", "expand", "project", "transpose")),
        *(f"conv.stages.{n}" for n in ("merge", "merged_factors", "merged_shape")),
        *("conv.onepass.apply_kernel", "galerkin.core_gradient", "network.NetworkStep", "network.StepOutcome"),
        *(
            f"inspection.{n}"
            for n in (
                "adds_up",
                "all_finite",
                "deviation",
                "largest_deviation",
                "look_other",
                "look_plain",
                "stays_finite",
            )
        ),
        *("tucker.magnitude", "tucker.rank_of"),
        *("rotation.khatri_rao", "ranks.divisors", "ranks.last_above"),
        *("ranks.choose_rank", "ranks.tails", "ranks.thresholds"),
        *(
            "rotation.principal_rotation",
            "rotation.randomized_rotation",
            "rotation.sketch_size",
            *(f"batching.{n}" for n in ("Batches", "few_and_large", "map_batched", "map_light")),
            *("orthonormal.cholesky_qr", "orthonormal.orthonormal_rows"),
        ),
        *("moments.Moment", "moments.NetworkMoments", "moments.find_moments", "moments.start_above_zero"),
        *("transport.core_moment", "transport.embed_moment", "transport.transport"),
        *("transport.transport_moment", "transport.transport_squares", "transport.transport_turned"),
        *(
            "transport.turn_moment",
            *(
                f"integrators.turning.{n}"
                for n in ("TurnedTangent", "overlaps", "project_core", "turn", "turn_all", "turned_basis")
            ),
        ),
        *(f"integrators.augmentation.{n}" for n in ("Augmented", "augment", "augment_all", "embed", "unchanged")),
        *("integrators.augmentation.augmented_width", "integrators.augmentation.new_directions"),
        *(
            f"integrators.base.{n}"
            for n in ("Galerkin", "Integrator", "Moved", "Truncation", "orthonormal_factors", "polished")
        ),
    ),
    _CHECKED: (
        *(f"conv.blocks.{n}" for n in ("fast_blocks", "in_blocks")),
        *(f"conv.convolution.{n}" for n in ("convolve", "kernel_gradient", "sample_pixels")),
        *(f"conv.geometry.{n}" for n in ("output_size", "pad_border", "pad_zeros", "wider_than_image")),
        *(f"conv.patches.{n}" for n in ("convolve_by_patches", "has_fast_patches", "patches", "product_of_patches")),
        *("conv.plans.plan_for", "conv.plans.work_of", "conv.transposed.transposed_padding"),
    ),
    _DERIVED: (
        *(
            "nn.convert.kernel_from_rule",
            "nn.linen.tucker_interceptor",
            "nn.modules.children",
            "nn.modules.replace_modules",
        ),
        *(
            "nn.plain.inference_function",
            "nn.summary.counted_kernel",
            "nn.summary.geometry_of",
            "nn.summary.module_path",
        ),
        *("nn.summary.layers_with_kernels", "nn.summary.record_inputs", "models.resnet18.BasicBlock"),
        *("programs.called_targets", "programs.check_program"),
    ),
    _CHECKER: (
        *(f"arguments.check_{n}" for n in ("array", "callable", "concrete", "dtype", "input", "integer", "integers")),
        *(f"arguments.check_{n}" for n in ("key", "mapping", "number", "path", "precision", "rngs", "shape")),
        *("arguments.check_transformation", "network.check_extra"),
    ),
    _STORED: (
        *(f"checkpoint.damage.{n}" for n in ("damaged", "listed", "naming_leaves", "not_written")),
        *(
            f"checkpoint.description.{n}"
            for n in ("check_metadata", "empty_arrays", "json_checksum", "read_description")
        ),
        *(f"checkpoint.directory.{n}" for n in ("check_links", "existing_step", "open_manager")),
        *(f"checkpoint.leaves.{n}" for n in ("check_leaf", "check_names", "check_tree", "checksum", "free_axes")),
        *(f"checkpoint.leaves.{n}" for n in ("kernel_ranks", "named_leaves", "stored_form", "to_device", "to_host")),
        "checkpoint.leaves.younger",
    ),
    _RAISED: ("checkpoint.DamagedError",),
    _NOTHING: ("compiler_options",),
}
EXEMPT = {name: reason for reason, names in REASONS.items() for name in names}
