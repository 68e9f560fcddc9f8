//! Batches what goes out on a connection: a task that writes for many others runs after them.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// Runs a task's future, and each time that it is woken lets the tasks go first that are ready by then.
///
/// For one that sends what other tasks hand to it. Tokio runs a task that was woken as the very next one,
/// so it would be woken, and would write to the connection, for each of them by itself. To be awaited as a
/// whole task: whatever else the task waits for is put off too.
pub async fn coalesce_wakeups<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut gave_way = false;
    poll_fn(|cx| {
        gave_way = !gave_way;
        if gave_way {
            // Woken while it runs, a task is queued behind those that are ready.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        future.as_mut().poll(cx)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_several_tasks_hand_over_is_taken_at_once() {
        let handing_over = async {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            let taking = tokio::spawn(coalesce_wakeups(async move {
                let mut taken = Vec::new();
                receiver.recv_many(&mut taken, 8).await;
                taken.len()
            }));
            // Until it waits.
            tokio::task::yield_now().await;
            for number in 0..3 {
                let sender = sender.clone();
                tokio::spawn(async move { sender.send(number) });
            }
            taking.await
        };
        // On the worker, where the tasks are.
        assert_eq!(tokio::spawn(handing_over).await.unwrap().unwrap(), 3);
    }
}
