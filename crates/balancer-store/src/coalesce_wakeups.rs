//! Lets ready tasks run before the task that writes for them, so that one write carries what several tasks send.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// Runs a task's future and, each time the task is woken, lets the tasks that are ready by then run first.
///
/// For a task that sends what other tasks hand to it. Tokio runs a woken task next, so the sending task would be
/// woken once for each of the others, and would write to its connection once for each. Use it for a whole task:
/// everything else that the task waits for is delayed too.
pub async fn coalesce_wakeups<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut yielded = false;
    poll_fn(|cx| {
        yielded = !yielded;
        if yielded {
            // A task that is woken while it runs is queued behind the tasks that are ready.
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
    async fn one_poll_receives_what_several_tasks_send() {
        let send_from_tasks = async {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            let receiving = tokio::spawn(coalesce_wakeups(async move {
                let mut received = Vec::new();
                receiver.recv_many(&mut received, 8).await;
                received.len()
            }));
            // Until the receiver waits.
            tokio::task::yield_now().await;
            for number in 0..3 {
                let sender = sender.clone();
                tokio::spawn(async move { sender.send(number) });
            }
            receiving.await
        };
        // Run on the worker thread, like the tasks.
        assert_eq!(tokio::spawn(send_from_tasks).await.unwrap().unwrap(), 3);
    }
}
