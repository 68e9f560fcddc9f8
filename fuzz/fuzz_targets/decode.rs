//! Decoding an AdmissionReview gives what `serde_json` reads of the same bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| balancer_fuzz::check_decoding(body));
