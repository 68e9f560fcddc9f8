//! The greeting of `--dev`: a command to try the webhook with.

use std::net::SocketAddr;

/// Prints how to send a sample review of this repository.
pub(crate) fn print_greeting(address: SocketAddr) {
    let port = address.port();
    println!(
        "Serving with the memory store and a self-signed certificate. Try it in the folder of the repository:\n\n\
         curl -sk https://localhost:{port}/mutate -H 'Content-Type: application/json' \
         --data-binary @tests/fixtures/k8s-1.36-spark-3.5-create-executor.json\n"
    );
}
