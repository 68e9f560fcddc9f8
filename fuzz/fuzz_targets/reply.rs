//! Every body that decodes gets a valid reply.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| balancer_fuzz::check_reply(body));
