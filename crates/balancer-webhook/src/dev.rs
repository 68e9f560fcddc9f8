//! What `--dev` tells the person who tries the webhook: one line to paste.

use std::net::SocketAddr;

/// Prints how to send the sample review of this repository.
pub(crate) fn greet(address: SocketAddr) {
    let port = address.port();
    println!(
        "Serving admissions from memory, with a certificate made just now. Try it, from the repository's folder:\n\n\
         curl -sk https://localhost:{port}/mutate -H 'Content-Type: application/json' \
         --data-binary @tests/fixtures/k8s-1.36-spark-3.5-create-executor.json\n"
    );
}
