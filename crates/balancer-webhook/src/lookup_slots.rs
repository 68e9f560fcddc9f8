//! How many driver lookups run and wait at once, in the process and in each namespace, so that no namespace can delay
//! the lookups of another for long, or load the Kubernetes API without end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Requests to the Kubernetes API in flight. A list that finds one pod takes a few milliseconds, so this serves more
/// than a thousand lookups per second.
const MAX_RUNNING: usize = 8;
/// A quarter of [`MAX_RUNNING`]: one namespace leaves most slots to the others.
const MAX_RUNNING_PER_NAMESPACE: usize = 2;
/// Lookups of one namespace, running or waiting. At 10 ms for each, the last one waits for a third of a second.
const MAX_PER_NAMESPACE: usize = 64;
/// Lookups of all namespaces, running or waiting. It bounds memory, to a few kilobytes for each.
const MAX_IN_PROCESS: usize = 1024;

/// The slots of a process.
#[derive(Debug)]
pub(crate) struct LookupSlots {
    running: Semaphore,
    queues: Mutex<Queues>,
}

#[derive(Debug, Default)]
struct Queues {
    /// The sum of all `lookups`.
    total: usize,
    /// The namespaces with lookups. The total bounds their number.
    namespaces: HashMap<String, Queue>,
}

#[derive(Debug)]
struct Queue {
    running: Arc<Semaphore>,
    lookups: usize,
}

impl LookupSlots {
    pub(crate) fn new() -> Self {
        Self { running: Semaphore::new(MAX_RUNNING), queues: Mutex::default() }
    }

    /// A place in the namespace's queue, or `None` if too many lookups are in it or in all queues together.
    pub(crate) fn enter(self: &Arc<Self>, namespace: &str) -> Option<QueuedLookup> {
        let mut queues = self.queues();
        if queues.total >= MAX_IN_PROCESS {
            return None;
        }
        let running = match queues.namespaces.get_mut(namespace) {
            Some(queue) if queue.lookups >= MAX_PER_NAMESPACE => return None,
            Some(queue) => {
                queue.lookups += 1;
                Arc::clone(&queue.running)
            }
            None => {
                let running = Arc::new(Semaphore::new(MAX_RUNNING_PER_NAMESPACE));
                let queue = Queue { running: Arc::clone(&running), lookups: 1 };
                queues.namespaces.insert(namespace.to_owned(), queue);
                running
            }
        };
        queues.total += 1;
        Some(QueuedLookup { slots: Arc::clone(self), namespace: namespace.to_owned(), running })
    }

    fn leave(&self, namespace: &str) {
        let mut queues = self.queues();
        queues.total = queues.total.saturating_sub(1);
        if let Some(queue) = queues.namespaces.get_mut(namespace) {
            queue.lookups = queue.lookups.saturating_sub(1);
            if queue.lookups == 0 {
                queues.namespaces.remove(namespace);
            }
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lookup that waits for its slot or runs. Dropping it leaves the queue.
#[derive(Debug)]
pub(crate) struct QueuedLookup {
    slots: Arc<LookupSlots>,
    namespace: String,
    running: Arc<Semaphore>,
}

impl QueuedLookup {
    /// Waits for a slot, which is free again when it is dropped. Slots are given in the order of the calls.
    pub(crate) async fn slot(&self) -> Option<Slot<'_>> {
        // The namespace's slot first, so that a namespace has at most two lookups in the queue of the process.
        let namespace = self.running.acquire().await.ok()?;
        let process = self.slots.running.acquire().await.ok()?;
        Some(Slot { _namespace: namespace, _process: process })
    }
}

impl Drop for QueuedLookup {
    fn drop(&mut self) {
        self.slots.leave(&self.namespace);
    }
}

/// The right to send a request to the Kubernetes API.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    _namespace: SemaphorePermit<'a>,
    _process: SemaphorePermit<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;

    use futures::FutureExt;

    fn enter(slots: &Arc<LookupSlots>, namespace: &str, lookups: usize) -> Vec<QueuedLookup> {
        (0..lookups).map_while(|_| slots.enter(namespace)).collect()
    }

    /// The lookups that get a slot without waiting.
    fn running(lookups: &[QueuedLookup]) -> Vec<Slot<'_>> {
        lookups.iter().filter_map(|lookup| lookup.slot().now_or_never().flatten()).collect()
    }

    #[test]
    fn a_namespace_runs_two_lookups_and_the_process_eight() {
        let slots = Arc::new(LookupSlots::new());
        let lookups: Vec<_> = (0..6).map(|i| enter(&slots, &format!("namespace-{i}"), 5)).collect();
        let running: Vec<_> = lookups.iter().map(|lookups| running(lookups)).collect();
        assert_eq!(running.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2, 2, 0, 0]);
    }

    #[test]
    fn the_next_lookup_runs_when_a_slot_is_free() {
        let slots = Arc::new(LookupSlots::new());
        let lookups = enter(&slots, "etl", 3);
        let first = running(&lookups);
        let mut third = Box::pin(lookups[2].slot());
        assert!(third.as_mut().now_or_never().is_none());
        drop(first);
        assert!(third.now_or_never().flatten().is_some());
    }

    #[test]
    fn a_full_namespace_refuses_and_others_do_not() {
        let slots = Arc::new(LookupSlots::new());
        let etl = enter(&slots, "etl", 2 * MAX_PER_NAMESPACE);
        assert_eq!(etl.len(), MAX_PER_NAMESPACE);
        assert!(slots.enter("ml").is_some());
        drop(etl);
        assert!(slots.enter("etl").is_some());
    }

    #[test]
    fn the_process_refuses_when_all_queues_together_are_full() {
        let slots = Arc::new(LookupSlots::new());
        let namespaces = (0..2 * MAX_IN_PROCESS).map(|i| slots.enter(&format!("namespace-{i}")));
        let lookups: Vec<_> = namespaces.flatten().collect();
        assert_eq!(lookups.len(), MAX_IN_PROCESS);
        drop(lookups);
        assert!(slots.queues().namespaces.is_empty());
        assert!(slots.enter("etl").is_some());
    }
}
