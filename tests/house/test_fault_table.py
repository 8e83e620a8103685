"""Every fault that was found in the first version, and the test that keeps it mended."""

import re

import pytest
from checkout import ROOT

FAULTS = {
    # silently wrong
    "an empty second or third negative prompt was encoded as it is":
        "pipeline/test_fallbacks.py::test_prompts_fall_back_as_in_diffusers",
    "every FLUX without embedded guidance was taken for schnell":
        "pipeline/test_fallbacks.py::test_a_flux_without_guidance_is_schnell_by_its_scheduler",
    "added_tokens.json, added_tokens_decoder, special_tokens_map.json were not read":
        "encoders/test_added_tokens.py::test_learned_tokens_have_the_ids_of_transformers",
    "an index was read where transformers reads the single file":
        "weights/test_weight_files.py::test_a_single_file_beside_an_index",
    "a stale index hid the single file":
        "weights/test_weight_files.py::test_a_stale_index_beside_a_single_file_of_transformers",
    "a tied name alone was refused":
        "weights/test_weight_files.py::test_embeddings_of_t5_under_either_name",
    "a whole CLIPModel was refused":
        "weights/test_weight_files.py::test_the_text_half_of_a_whole_clip",
    "converted weights that changed loaded without a word":
        "weights/test_convert_checksums.py::test_damaged_weights_are_not_loaded",
    "another fingerprint loaded without a word":
        "weights/test_convert_checksums.py::test_a_config_that_was_edited_is_refused",
    "a fetched folder with a flipped bit had no check":
        "weights/test_convert_checksums.py::test_a_snapshot_of_the_hub_is_compared_with_the_names_of_its_blobs",
    "verify passed over what Orbax reads beside the chunks":
        "weights/test_convert_checksums.py::test_what_orbax_reads_beside_the_chunks_is_compared",
    "verify and --no-verify":
        "commands/test_verify.py::test_a_flipped_bit_is_named_and_loaded_only_on_request",
    "weights that are not finite were only seen in float16":
        "weights/test_finite.py::test_folders_of_both_formats_name_the_parameter",
    "latents that are not finite made a black image and success":
        "pipeline/test_health.py::test_the_first_step_that_is_not_finite_is_named",
    "guidance of 1e38, latents and embeddings of NaN were taken":
        "pipeline/test_request.py::test_sd3_refuses",
    "resume files took changed picks":
        "calibration/test_resume.py::test_changed_progress_is_refused",
    "plans with tiles of nothing or rising noise could be signed":
        "plan/test_plan.py::test_faults_are_named",
    "escape sequences of a plan reached the terminal":
        "plan/test_plan.py::test_what_a_plan_says_is_shown_and_never_obeyed",
    "mathtext of a plan reached matplotlib":
        "plan/test_plan.py::test_dollars_in_a_plan_are_no_markup",
    "strict promotion failed":
        "pipeline/test_surroundings.py::test_all_tests_run_with_strict_promotion",
    "64-bit JAX failed":
        "pipeline/test_surroundings.py::test_64_bit_jax_changes_no_number",
    "a notebook's MPLBACKEND failed":
        "plan/test_plan.py::test_a_picture_needs_no_backend_of_the_environments",
    "an ASCII stdout failed":
        "commands/test_sample.py::test_a_path_beyond_an_ascii_stdout_is_printed_byte_for_byte",
    "no HOME failed":
        "commands/test_sample.py::test_without_a_home_compiled_programs_are_not_kept",
    "a cache of programs that cannot be written warned in JAX's words":
        "commands/test_sample.py::test_a_cache_that_cannot_be_written_is_one_line",
    "a reader that leaves made a traceback":
        "commands/test_flags.py::test_a_reader_that_has_left_ends_a_command_quietly",
    "U+2028 and U+0085 ended a prompt":
        "commands/test_sample.py::test_lines_of_a_prompt_file_end_where_editors_end_them",
    "a shift of 0 was refused":
        "sampling/test_schedule.py::test_shifts_of_any_sign_are_those_of_diffusers",
    "embeddings of torch in bfloat16 or with a gradient were a TypeError":
        "pipeline/test_request.py::test_embeddings_come_straight_from_a_torch_encoder",
    "a float64 tensor was called quantised":
        "weights/test_faults.py::test_float64_tensors_are_read",
    "seeds above 2**63 in a list were refused":
        "pipeline/test_output.py::test_seeds_are_taken_as_they_come_and_recorded_whole",
    # lost or half-written
    "two writers of one file were seen in part":
        "io/test_atomic.py::test_many_writers_of_one_file_are_never_seen_in_part",
    "modes and links were lost":
        "io/test_atomic.py::test_a_link_stays_and_its_target_is_written",
    "leftovers of killed runs stayed":
        "io/test_atomic.py::test_leftovers_go_and_files_of_living_writers_and_of_others_stay",
    "images were visible half-written":
        "pipeline/test_output.py::test_an_image_is_written_as_a_whole_or_not_at_all",
    "kill -9 at random moments":
        "io/test_kills.py::test_twenty_killed_commands_are_made_good_by_the_next_run",
    "signals left dfa2-convert's folder":
        "weights/test_convert.py::test_a_signal_stops_the_writers_and_leaves_nothing",
    "a full disk was a traceback":
        "weights/test_convert.py::test_a_disk_that_fills_up",
    "networks that do not fit each other failed late":
        "pipeline/test_fit.py::test_widths_that_differ_are_named",
    "absurd sizes were allocated before they were refused":
        "weights/test_faults.py::test_absurd_sizes_are_named_before_anything_is_built",
    "FIFOs and devices hung":
        "weights/test_special_files.py::test_what_is_no_file_is_named",
    "tokenizers panicked or grew without end":
        "encoders/test_hostile_tokenizers.py::test_work_without_end_is_left_after_a_while",
    "report --clip asked whether to run a folder's code":
        "report/test_report_metrics.py::test_clip_score_is_the_models_cosine_and_runs_no_code_of_the_folder",
    "a read-only target was found after the work":
        "io/test_atomic.py::test_what_is_no_regular_file_is_refused",
    "report pages had no policy":
        "report/test_page.py::test_the_policy_allows_the_pages_own_style_and_pictures_alone",
    "a mistyped path contacted a network":
        "weights/test_convert.py::test_nothing_is_fetched_unasked",
    "toy and benchmarks wrote files that others saw half-written":
        "house/test_house.py::test_files_are_written_as_a_whole",
    # found by the second attack
    "a snapshot whose blobs were gone was verified":
        "commands/test_attacks.py::test_a_link_to_nothing_in_a_snapshot_is_named",
    "of two processes on one image, the second replaced the first's":
        "commands/test_attacks.py::test_a_file_that_appeared_meanwhile_is_not_replaced",
    "two calibrations wrote one plan":
        "commands/test_attacks.py::test_one_calibration_at_a_time_writes_a_plan",
    "a bad image that was skipped or made again was success":
        "commands/test_attacks.py::test_bad_images_are_told_again_by_the_command_that_skips_them",
    "an image of one colour was none of one value":
        "commands/test_attacks.py::test_an_image_of_one_colour_is_a_fault",
    "a name that is too long was found after the work":
        "commands/test_attacks.py::test_a_name_that_cannot_be_is_refused_before_work",
    "a device among a tokenizer's files was copied without end":
        "commands/test_attacks.py::test_a_tokenizer_s_folder_holds_files_alone",
    "a billion images of a prompt were counted, and /dev/zero was read as prompts":
        "commands/test_attacks.py::test_absurd_counts_and_endless_prompts_are_refused",
    "escapes of an image's metadata reached the terminal":
        "commands/test_attacks.py::test_escapes_of_an_image_s_metadata_are_shown_as_text",
    "what attention remembers was of 64 bits":
        "commands/test_attacks.py::test_what_attention_remembers_is_of_32_bits",
    "NumPy's numbers and lists were refused by calibrate and reports":
        "commands/test_attacks.py::test_numpy_s_numbers_and_lists_are_natural",
    "an unknown dtype was a TypeError":
        "commands/test_attacks.py::test_a_dtype_that_is_none_is_named",
    "a plan's picture replaced another file":
        "commands/test_attacks.py::test_a_plan_is_drawn_beside_it_and_over_nothing_else",
    "a callback was told 1,000 sigma where diffusers has an integer timestep":
        "sampling/test_dpm.py::test_callbacks_are_told_the_timesteps_of_diffusers",
    "Ctrl-C while JAX was imported made a traceback":
        "io/test_signals.py::test_ctrl_c_while_jax_is_imported_ends_in_one_line",
    "a signal within the garbage collector was lost":
        "io/test_signals.py::test_a_signal_within_a_callback_of_the_garbage_collector_is_not_lost",
    "dfa2 report and dfa2 again took no --no-verify":
        "commands/test_verify.py::test_every_command_that_loads_a_folder_can_leave_out_its_checksums",
    # found by a third reading
    "dfa2 again replaced the image that it compared with":
        "commands/test_again.py::test_a_file_that_is_there_is_not_replaced",
    "dfa2 calibrate replaced its own prompts by a plan":
        "commands/test_calibrate.py::test_a_file_that_is_no_plan_is_not_replaced",
    "images of another VAE, scheduler or damaged folder were taken for made already":
        "weights/test_convert_checksums.py::test_a_folder_has_another_digest_once_any_part_of_it_has_changed",
    "a full stdout was a traceback":
        "commands/test_flags.py::test_a_full_stdout_is_one_line",
    "a thousand images of 16,384 pixels were asked of NumPy":
        "pipeline/test_request.py::test_flux_refuses",
    # use
    "generator= and other arguments of diffusers were unknown":
        "commands/test_flags.py::test_an_argument_of_diffusers_that_has_another_form_is_answered",
    '.to("cuda") was no attribute':
        "commands/test_flags.py::test_a_pipeline_that_is_sent_to_a_device_says_where_it_is",
    "words that the model in the box never saw went by":
        "commands/test_demo.py::test_words_that_the_model_in_the_box_never_saw_are_named",
    "a misspelt flag was told no nearest one":
        "commands/test_flags.py::test_an_unknown_word_is_told_the_nearest_and_the_usage_of_its_command",
    "a hub id was no folder":
        "io/test_hub.py::test_a_hub_id_opens_from_the_cache",
    "a single file was no folder":
        "io/test_hub.py::test_a_single_file_is_told_which_folder_is_needed",
    "an interrupted batch began anew":
        "commands/test_sample.py::test_an_interrupted_batch_goes_on_and_compiles_once",
    "an image could not be made again":
        "commands/test_again.py::test_an_image_is_made_anew_bit_for_bit",
    "a bar hid a compilation":
        "pipeline/test_output.py::test_the_bar_hides_no_compilation",
    "a report did not say its verdict":
        "report/test_report_command.py::test_the_first_line_is_a_verdict_in_words",
    "bars of a report hid compilations, and it told no phases":
        "report/test_report_command.py::test_no_bar_hides_a_compilation_and_phases_are_told",
    "the bar of a calibration hid a compilation":
        "calibration/test_calibration.py::test_a_bar_hides_no_compilation_and_phases_stand_before_it",
}  # fmt: skip
"""By fault, its test."""


@pytest.mark.checkout
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_test(fault):
    file, _, name = FAULTS[fault].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), FAULTS[fault]
