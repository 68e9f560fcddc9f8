//! Placing executors in another admission tool: from the bytes of a review to the bytes of its reply, with a ledger
//! of its own (here a map).
//!
//! ```sh
//! cargo run --example embed < tests/fixtures/k8s-1.36-spark-3.5-create-executor.json
//! ```

use std::collections::HashMap;
use std::io::{Read, Write};

use balancer_core::{
    Action, Conventions, JobLedger, PlaceOutcome, PlaceRequest, Policy, Reply, Review, ReviewError, SpotRatio,
};

/// The ledgers of all jobs in a map. Yours may be a table, or a field of a record that you have anyway.
#[derive(Default)]
struct Ledgers(HashMap<(String, String), JobLedger>);

/// Answers one review. `policy` is the job's policy, for example from the annotations of its driver.
fn admit(
    bytes: &[u8],
    conventions: &Conventions,
    ledgers: &mut Ledgers,
    policy: Policy,
    now_ms: u64,
) -> Result<Vec<u8>, ReviewError> {
    let review = Review::decode(bytes)?;
    let mut reply = Reply::allow(review.uid());
    let dry_run = review.is_dry_run();
    let action = Action::of(&review, conventions);
    match &action {
        Action::Place(executor) => {
            let ledger =
                ledgers.0.entry((executor.job.namespace.to_owned(), executor.job.app_id.to_owned())).or_default();
            let request = PlaceRequest { policy: Some(policy), ..PlaceRequest::of(executor) };
            let outcome = if dry_run { ledger.peek(&request, now_ms) } else { ledger.place(&request, now_ms) };
            // An executor of a job that is opted out is left unchanged.
            if let PlaceOutcome::Placed(placed) = outcome {
                reply.patch =
                    conventions.profile().apply(executor.pod, placed.capacity, executor.placeholder, &placed.spread);
            }
        }
        Action::Release(executor) | Action::Withdraw(executor) => {
            let job = (executor.job.namespace.to_owned(), executor.job.app_id.to_owned());
            if let Some(ledger) = ledgers.0.get_mut(&job).filter(|_| !dry_run) {
                ledger.release(executor.key, executor.uid, now_ms);
            }
            if matches!(action, Action::Withdraw(_)) {
                reply.patch = conventions.profile().withdraw(executor.pod);
            }
        }
        Action::Learn(driver) if driver.overrides.or_default(policy).spot_ratio != SpotRatio::Off => {
            reply.patch = conventions.profile().apply_to_driver(driver.pod);
        }
        Action::Learn(_) | Action::Ignore(_) => {}
    }
    Ok(reply.encode())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    let policy = Policy { spot_ratio: "70%".parse()?, ..Policy::default() };
    let reply = admit(&bytes, &Conventions::default(), &mut Ledgers::default(), policy, 0)?;
    std::io::stdout().write_all(&reply)?;
    println!();
    Ok(())
}
