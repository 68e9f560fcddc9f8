//! Placing inside another admission tool: from the bytes of a review to the bytes of its reply, with
//! a ledger of one's own (here a map).
//!
//! ```sh
//! cargo run --example embed < tests/fixtures/k8s-1.36-spark-3.5-create-executor.json
//! ```

use std::collections::HashMap;
use std::io::{Read, Write};

use balancer_core::{
    Conventions, Defaults, JobLedger, Outcome, Placing, Policy, Reply, Review, ReviewError, Subject, Work,
};

/// A ledger of every job, in a map. Yours may be a table, or a field of something that you keep anyway.
#[derive(Default)]
struct Ledgers(HashMap<(String, String), JobLedger>);

/// Answers one review. `policy` is what your tool knows of the job; the driver's annotation, perhaps.
fn admit(
    bytes: &[u8],
    conventions: &Conventions,
    ledgers: &mut Ledgers,
    policy: Policy,
    now_ms: u64,
) -> Result<Vec<u8>, ReviewError> {
    let review = Review::decode(bytes)?;
    let mut reply = Reply::allow(review.uid());
    let subject = Subject::of(&review, conventions);
    match &subject.work {
        Work::Place(executor) => {
            let ledger = ledgers.0.entry((executor.job.namespace.to_owned(), executor.job.id.to_owned())).or_default();
            let placing = Placing { policy: Some(policy), ..Placing::of(executor) };
            let outcome = if subject.dry_run { ledger.peek(&placing) } else { ledger.place(&placing, now_ms) };
            if let Outcome::Placed(placed) = outcome {
                reply.patch = conventions.patch(executor, placed.capacity);
            }
        }
        Work::Release(executor) if !subject.dry_run => {
            let job = (executor.job.namespace.to_owned(), executor.job.id.to_owned());
            if let Some(ledger) = ledgers.0.get_mut(&job) {
                ledger.release(executor.key, executor.uid, now_ms);
            }
        }
        Work::Release(_) | Work::Learn(_) | Work::Leave(_) => {}
    }
    Ok(reply.encode())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    let policy = Policy { ratio: "70%".parse()?, ..Defaults::default().policy() };
    let reply = admit(&bytes, &Conventions::default(), &mut Ledgers::default(), policy, 0)?;
    std::io::stdout().write_all(&reply)?;
    println!();
    Ok(())
}
