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
    "verify and --no-verify":
        "commands/test_verify.py::test_a_flipped_bit_is_named_and_loaded_only_on_request",
    "weights that are not finite were only seen in float16":
        "weights/test_finite.py",
    "latents that are not finite made a black image and success":
        "pipeline/test_health.py::test_the_first_step_that_is_not_finite_is_named",
    "guidance of 1e38, latents and embeddings of NaN were taken":
        "pipeline/test_request.py::test_sd3_refuses",
    "resume files took changed picks":
        "calibration/test_resume.py",
    "plans with tiles of nothing or rising noise could be signed":
        "plan/test_plan.py::test_faults_are_named",
    "escape sequences of a plan reached the terminal":
        "plan/test_plan.py::test_what_a_plan_says_",
    "mathtext of a plan reached matplotlib":
        "plan/test_plan.py::test_dollars_",
    "64-bit JAX failed":
        "pipeline/test_surroundings.py::test_64_bit_jax_changes_no_number",
    "a notebook's MPLBACKEND failed":
        "plan/test_plan.py::test_a_picture_needs_no_backend_",
    "an ASCII stdout failed":
        "commands/test_sample.py::test_a_path_beyond_an_ascii_stdout_is_printed_byte_for_byte",
    "no HOME failed":
        "commands/test_sample.py::test_without_a_home_compiled_programs_are_not_kept",
    "a reader that leaves made a traceback":
        "commands/test_flags.py::test_",
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
        "io/test_atomic.py::test_a_link_stays_",
    "leftovers of killed runs stayed":
        "io/test_atomic.py::test_leftovers_go_",
    "images were visible half-written":
        "pipeline/test_output.py::test_an_image_is_written_as_a_whole_or_not_at_all",
    "kill -9 at random moments":
        "io/test_kills.py",
    "signals left dfa2-convert's folder":
        "weights/test_convert.py::test_a_signal_stops_the_writers_",
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
    "report pages had no policy":
        "report/test_page.py",
    "a mistyped path contacted a network":
        "weights/test_convert.py::test_nothing_is_fetched_unasked",
    # use
    "a hub id was no folder":
        "io/test_hub.py::test_a_hub_id_opens_from_the_cache",
    "an interrupted batch began anew":
        "commands/test_sample.py::test_an_interrupted_batch_goes_on_and_compiles_once",
    "an image could not be made again":
        "commands/test_again.py",
    "a bar hid a compilation":
        "pipeline/test_output.py::test_the_bar_hides_no_compilation",
    "a report did not say its verdict":
        "report/test_report_command.py::test_the_first_line_is_a_verdict_in_words",
}  # fmt: skip
"""By fault, its test: a file of tests, or the name, or its beginning, of one in it."""


@pytest.mark.checkout
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_test(fault):
    file, _, name = FAULTS[fault].partition("::")
    assert re.search(rf"^def {name or 'test_'}", (ROOT / "tests" / file).read_text(), re.MULTILINE), FAULTS[fault]
