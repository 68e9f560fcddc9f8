//! Reads the body of a request. Memory is reserved for the bytes that have arrived, and a client that sends too slowly is
//! cut off.

use std::error::Error;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Body;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};

/// The largest body. The apiserver accepts objects of up to 3 MiB, and a review adds little to one.
pub(crate) const MAX_BODY: usize = 4 << 20;
/// Up to here a body is small. The review of an executor has 8.5 KB.
const SMALL_BODY: usize = 64 << 10;
/// Steps in which memory is reserved for a small body. One step holds the review of an executor.
const SMALL_STEP: usize = 16 << 10;
/// Steps in which memory is reserved for a larger body.
const LARGE_STEP: usize = 256 << 10;
/// Memory that small bodies of one connection always have, in KiB: four reviews of executors at once. All connections
/// together may use 24 MiB.
const OWN_KIB: usize = 64;
/// Memory for what small bodies need beyond that, in KiB: a thousand reviews of executors at once.
const SHARED_KIB: usize = 16 << 10;
/// Memory for what larger bodies have beyond [`SMALL_BODY`], in KiB: eight reviews of the largest objects.
const LARGE_KIB: usize = 24 << 10;
/// What small bodies of one connection may take while they wait for memory, in KiB: seven reviews of executors. Over HTTP/2
/// they keep that much of the connection's window at most, so the other bodies can go on.
const WAITING_KIB: usize = 64;
/// What a body that is not complete may take while it waits: the window of its stream.
const INCOMPLETE_KIB: u32 = 32;
/// From the end of a request's head to the end of its body.
const BODY_LIMIT: Duration = Duration::from_secs(10);
/// The slowest transfer, in bytes per second. An apiserver is a thousand times as fast.
const MIN_RATE: u32 = 16 << 10;
/// How long a client may send nothing. An apiserver sends a body without a pause, so this is for lost packets.
const PAUSE_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the body is too large; accepted: at most {MAX_BODY} bytes")]
    TooLarge,
    #[error("the body is incomplete")]
    Incomplete(#[source] Box<dyn Error + Send + Sync>),
    #[error(
        "the body arrived too slowly; accepted: complete within {} s, without a pause of {} s, at {MIN_RATE} bytes a second",
        BODY_LIMIT.as_secs(),
        PAUSE_LIMIT.as_secs()
    )]
    TooSlow,
    #[error("too many bodies at once; try again")]
    NoMemory,
}

/// The memory for the bodies of one connection.
#[derive(Debug)]
pub(crate) struct BodyMemory {
    own: Semaphore,
    waiting: Semaphore,
    pools: Arc<Pools>,
    /// Bodies that are not complete yet.
    incomplete: AtomicU32,
}

/// What the connections share.
#[derive(Debug)]
struct Pools {
    small: Semaphore,
    large: Semaphore,
}

impl Default for BodyMemory {
    fn default() -> Self {
        Self::of(Arc::new(Pools { small: Semaphore::new(SHARED_KIB), large: Semaphore::new(LARGE_KIB) }))
    }
}

impl BodyMemory {
    fn of(pools: Arc<Pools>) -> Self {
        Self {
            own: Semaphore::new(OWN_KIB),
            waiting: Semaphore::new(WAITING_KIB),
            pools,
            incomplete: AtomicU32::new(0),
        }
    }

    /// The memory for another connection.
    pub(crate) fn another_connection(&self) -> Self {
        Self::of(Arc::clone(&self.pools))
    }

    /// How many bodies of this connection are not complete yet.
    pub(crate) fn incomplete(&self) -> u32 {
        self.incomplete.load(Ordering::Relaxed)
    }

    /// Reads a whole body. Keep the reservation as long as the body.
    pub(crate) async fn read<B>(&self, body: B) -> Result<(Bytes, Reservation<'_>), BodyError>
    where
        B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Unpin,
    {
        self.incomplete.fetch_add(1, Ordering::Relaxed);
        let _incomplete = Incomplete(&self.incomplete);
        let progress = Progress::new(Instant::now());
        let mut timer = pin!(sleep_until(progress.deadline()));
        let mut reader = Reader { body, progress };
        let mut reservation = Reservation::default();
        let mut parts = Parts::default();
        while !reader.body.is_end_stream() {
            let Some(data) = reader.next(timer.as_mut()).await? else { break };
            let (length, is_complete) = (parts.length() + data.len(), reader.body.is_end_stream());
            self.reserve(&mut reservation, length, is_complete, &mut reader.progress).await?;
            reader.progress.received(data.len(), Instant::now());
            parts.add(data, reservation.capacity);
        }
        Ok((parts.join(), reservation))
    }

    /// Reserves memory for a body of which `length` bytes have arrived. A body that has memory never waits for more: bodies
    /// that wait for each other would keep the connection's window from all others.
    async fn reserve<'a>(
        &'a self,
        reservation: &mut Reservation<'a>,
        length: usize,
        is_complete: bool,
        progress: &mut Progress,
    ) -> Result<(), BodyError> {
        if length <= reservation.capacity {
            return Ok(());
        }
        if length > MAX_BODY {
            return Err(BodyError::TooLarge);
        }
        let small = length.min(SMALL_BODY).next_multiple_of(SMALL_STEP);
        let missing = kib(small.saturating_sub(reservation.capacity));
        if missing > 0 {
            if let Ok(own) = self.own.try_acquire_many(missing) {
                reservation.own.add(own);
            } else if let Ok(shared) = self.pools.small.try_acquire_many(missing) {
                reservation.shared.add(shared);
            } else if reservation.capacity == 0 {
                let taken = if is_complete { kib(length.next_multiple_of(1024)) } else { INCOMPLETE_KIB };
                let _taken = self.waiting.try_acquire_many(taken).map_err(|_| BodyError::NoMemory)?;
                reservation.own.add(wait(&self.own, missing, progress).await?);
            } else {
                return Err(BodyError::NoMemory);
            }
            reservation.capacity = small;
        }
        if length > SMALL_BODY {
            let large = length.next_multiple_of(LARGE_STEP);
            let missing = kib(large.saturating_sub(reservation.capacity));
            let large_memory = self.pools.large.try_acquire_many(missing).map_err(|_| BodyError::NoMemory)?;
            reservation.large.add(large_memory);
            reservation.capacity = large;
        }
        Ok(())
    }
}

/// Waits until memory is free. The client cannot send meanwhile, so this is no pause of the client's.
async fn wait<'a>(pool: &'a Semaphore, kib: u32, progress: &mut Progress) -> Result<SemaphorePermit<'a>, BodyError> {
    let started = Instant::now();
    let permit = timeout_at(progress.end, pool.acquire_many(kib)).await.ok().and_then(Result::ok);
    progress.waited(started.elapsed());
    permit.ok_or(BodyError::NoMemory)
}

fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes / 1024).unwrap_or(u32::MAX)
}

/// Counts an incomplete body until it is dropped.
struct Incomplete<'a>(&'a AtomicU32);

impl Drop for Incomplete<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What has arrived of a body. A body that arrives in one part, as the review of an executor does, is not copied.
#[derive(Default)]
struct Parts {
    first: Bytes,
    /// From the second part on, all parts.
    all: Vec<u8>,
}

impl Parts {
    fn length(&self) -> usize {
        if self.all.is_empty() { self.first.len() } else { self.all.len() }
    }

    /// Adds a part. `capacity` is what is reserved for all of them.
    fn add(&mut self, part: Bytes, capacity: usize) {
        // A client may end its body with an empty part.
        if part.is_empty() {
            return;
        }
        if self.length() == 0 {
            self.first = part;
            return;
        }
        self.all.reserve_exact(capacity.saturating_sub(self.all.len()));
        if self.all.is_empty() {
            self.all.extend_from_slice(&std::mem::take(&mut self.first));
        }
        self.all.extend_from_slice(&part);
    }

    fn join(self) -> Bytes {
        if self.all.is_empty() { self.first } else { self.all.into() }
    }
}

/// Memory that is reserved for one body until it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Reservation<'a> {
    own: Permits<'a>,
    shared: Permits<'a>,
    large: Permits<'a>,
    /// For how many bytes.
    capacity: usize,
}

/// What one body has of one semaphore.
#[derive(Debug, Default)]
struct Permits<'a>(Option<SemaphorePermit<'a>>);

impl<'a> Permits<'a> {
    fn add(&mut self, permit: SemaphorePermit<'a>) {
        match &mut self.0 {
            Some(permits) => permits.merge(permit),
            None => self.0 = Some(permit),
        }
    }
}

/// Reads the frames of a body, as long as the client is fast enough.
struct Reader<B> {
    body: B,
    progress: Progress,
}

impl<B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Unpin> Reader<B> {
    /// The next data; none at the end. `timer` may be at any earlier deadline.
    async fn next(&mut self, mut timer: Pin<&mut Sleep>) -> Result<Option<Bytes>, BodyError> {
        poll_fn(|cx| {
            loop {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(None) => return Poll::Ready(Ok(None)),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(BodyError::Incomplete(error.into()))),
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(data) => return Poll::Ready(Ok(Some(data))),
                        // Trailers mean nothing here.
                        Err(_) => continue,
                    },
                    Poll::Pending => {}
                }
                // The deadline moves with every frame. The timer follows when it fires, which is seldom.
                ready!(timer.as_mut().poll(cx));
                if timer.deadline() >= self.progress.deadline() {
                    return Poll::Ready(Err(BodyError::TooSlow));
                }
                timer.as_mut().reset(self.progress.deadline());
            }
        })
        .await
    }
}

/// Whether a client sends fast enough: a pure value that receives the time.
#[derive(Clone, Copy, Debug)]
struct Progress {
    /// By when the next bytes must arrive.
    next: Instant,
    /// By when the body must be complete.
    end: Instant,
}

impl Progress {
    fn new(now: Instant) -> Self {
        Self { next: now + PAUSE_LIMIT, end: now + BODY_LIMIT }
    }

    /// Bytes prolong the time for the next ones by as long as they may take, so that single bytes prolong it by nothing.
    /// What a fast client sends ahead does not pay for a longer pause.
    fn received(&mut self, bytes: usize, now: Instant) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let worth = Duration::from_secs(1) * bytes / MIN_RATE;
        self.next = (self.next + worth).min(now + PAUSE_LIMIT);
    }

    /// The body waited for memory, which is not the client's fault.
    fn waited(&mut self, time: Duration) {
        self.next += time;
    }

    fn deadline(&self) -> Instant {
        self.next.min(self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::convert::Infallible;

    use futures::{StreamExt, stream};
    use http_body_util::{BodyExt, Full, StreamBody};
    use hyper::body::Frame;
    use tokio::time::sleep;

    type Chunks = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

    /// A body of `count` chunks of `size` bytes, each after a pause.
    fn chunks(count: usize, size: usize, pause: Duration) -> Chunks {
        let chunks = stream::iter(0..count).then(move |_| async move {
            if !pause.is_zero() {
                sleep(pause).await;
            }
            Ok(Frame::data(Bytes::from(vec![b' '; size])))
        });
        StreamBody::new(chunks).boxed_unsync()
    }

    /// A body that ends with a client that sends nothing more.
    fn stalled(size: usize) -> Chunks {
        let chunks = stream::iter([Ok(Frame::data(Bytes::from(vec![b' '; size])))]).chain(stream::pending());
        StreamBody::new(chunks).boxed_unsync()
    }

    fn free(memory: &BodyMemory) -> (usize, usize, usize) {
        let Pools { small, large } = &*memory.pools;
        (memory.own.available_permits(), small.available_permits(), large.available_permits())
    }

    const ALL: (usize, usize, usize) = (OWN_KIB, SHARED_KIB, LARGE_KIB);
    const REVIEW: usize = 8500;

    #[tokio::test]
    async fn a_body_in_one_piece_is_returned_as_it_is() {
        let (memory, sent) = (BodyMemory::default(), Bytes::from(vec![b'x'; REVIEW]));
        let in_one = Full::new(sent.clone()).boxed_unsync();
        let frames = [sent.clone(), Bytes::new()].map(|data| Ok(Frame::data(data)));
        let with_an_empty_end = StreamBody::new(stream::iter(frames)).boxed_unsync();
        for body in [in_one, with_an_empty_end] {
            let (body, reservation) = memory.read(body).await.unwrap();
            assert_eq!((body.as_ptr(), body.len()), (sent.as_ptr(), REVIEW));
            assert_eq!(free(&memory), (OWN_KIB - 16, SHARED_KIB, LARGE_KIB));
            drop(reservation);
            assert_eq!(free(&memory), ALL);
        }
    }

    #[tokio::test]
    async fn bodies_of_all_sizes_are_read_completely() {
        let memory = BodyMemory::default();
        for size in [0, 1, SMALL_STEP, SMALL_STEP + 1, SMALL_BODY, SMALL_BODY + 1, 300_000, 3 << 20, MAX_BODY] {
            let sent: Vec<u8> = (0..size).map(|index| (index % 251) as u8).collect();
            let pieces: Vec<_> = sent
                .chunks(10_000)
                .map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(piece))))
                .collect();
            let (body, reservation) = memory.read(StreamBody::new(stream::iter(pieces))).await.unwrap();
            assert!(body == sent, "{size}");
            assert!(
                reservation.capacity >= size && reservation.capacity < size + LARGE_STEP,
                "{size}: {reservation:?}"
            );
        }
        assert_eq!(free(&memory), ALL);
        assert_eq!(memory.incomplete(), 0);
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused() {
        let memory = BodyMemory::default();
        let refused = memory.read(chunks(MAX_BODY / 1000 + 1, 1000, Duration::ZERO)).await;
        assert!(matches!(refused, Err(BodyError::TooLarge)), "{refused:?}");
        let refused = memory.read(Full::new(Bytes::from(vec![0; MAX_BODY + 1]))).await;
        assert!(matches!(refused, Err(BodyError::TooLarge)), "{refused:?}");
        assert_eq!(free(&memory), ALL);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_reserved_for_received_bytes_alone() {
        let memory = BodyMemory::default();
        let started = Instant::now();
        let reading = memory.read(stalled(1));
        let check = async {
            sleep(PAUSE_LIMIT / 2).await;
            assert_eq!(free(&memory), (OWN_KIB - 16, SHARED_KIB, LARGE_KIB));
            assert_eq!(memory.incomplete(), 1);
        };
        let (read, ()) = tokio::join!(reading, check);
        assert!(matches!(read, Err(BodyError::TooSlow)), "{read:?}");
        assert_eq!(started.elapsed(), PAUSE_LIMIT);
        assert_eq!(free(&memory), ALL);
    }

    #[tokio::test(start_paused = true)]
    async fn single_bytes_do_not_keep_a_body_alive() {
        let (memory, started) = (BodyMemory::default(), Instant::now());
        let read = memory.read(chunks(1000, 1, Duration::from_millis(500))).await;
        assert!(matches!(read, Err(BodyError::TooSlow)), "{read:?}");
        assert!(started.elapsed() < PAUSE_LIMIT + Duration::from_millis(500), "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_but_steady_client_is_served_and_one_below_the_rate_is_not() {
        let memory = BodyMemory::default();
        let pause = Duration::from_millis(500);
        memory.read(chunks(18, MIN_RATE as usize / 2, pause)).await.unwrap();
        let read = memory.read(chunks(18, MIN_RATE as usize / 3, pause)).await;
        assert!(matches!(read, Err(BodyError::TooSlow)), "{read:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_fast_does_not_pay_for_a_pause() {
        let (memory, started) = (BodyMemory::default(), Instant::now());
        let read = memory.read(stalled(1 << 20)).await;
        assert!(matches!(read, Err(BodyError::TooSlow)), "{read:?}");
        assert_eq!(started.elapsed(), PAUSE_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_ends_by_the_limit_however_fast_it_is() {
        let (memory, started) = (BodyMemory::default(), Instant::now());
        let read = memory.read(chunks(1000, MIN_RATE as usize, Duration::from_millis(100))).await;
        assert!(matches!(read, Err(BodyError::TooSlow)), "{read:?}");
        assert_eq!(started.elapsed(), BODY_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn small_bodies_do_not_wait_for_large_ones_and_large_ones_end_in_time() {
        let memory = BodyMemory::default();
        let attack: Vec<_> = (0..200).map(|_| memory.another_connection()).collect();
        let large = futures::future::join_all(
            attack.iter().map(|memory| memory.read(chunks(1000, 64 << 10, Duration::from_millis(100)))),
        );
        let small = async {
            sleep(BODY_LIMIT / 2).await;
            assert!(memory.pools.large.available_permits() < LARGE_KIB / 2);
            let started = Instant::now();
            for _ in 0..100 {
                memory.read(chunks(2, REVIEW, Duration::ZERO)).await.unwrap();
            }
            started.elapsed()
        };
        let started = Instant::now();
        let (large, small) = tokio::join!(large, small);
        assert_eq!(small, Duration::ZERO);
        assert!(started.elapsed() <= BODY_LIMIT, "{:?}", started.elapsed());
        assert!(large.iter().any(|read| matches!(read, Err(BodyError::NoMemory))));
        drop(large);
        assert_eq!(free(&memory), ALL);
    }

    #[tokio::test(start_paused = true)]
    async fn large_bodies_beside_each_other_are_read_or_refused_at_once() {
        let (memory, started) = (BodyMemory::default(), Instant::now());
        let pause = Duration::from_millis(1);
        let count = 3 * 64;
        let read = futures::future::join_all((0..16).map(async |_| {
            let read = memory.read(chunks(count, 16 << 10, pause)).await;
            match read {
                Ok((body, _)) => Ok(body.len()),
                Err(error) => Err(error),
            }
        }));
        let read = read.await;
        assert!(started.elapsed() < 2 * u32::try_from(count).unwrap() * pause, "{:?}", started.elapsed());
        let complete = read.iter().filter(|read| matches!(read, Ok(length) if *length == 3 << 20)).count();
        let refused = read.iter().filter(|read| matches!(read, Err(BodyError::NoMemory))).count();
        assert!(complete >= 4 && complete + refused == 16, "{complete} complete, {refused} refused");
        assert_eq!(free(&memory), ALL);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_of_reviews_waits_for_its_connection_and_incomplete_bodies_leave_room_in_the_window() {
        let memory = BodyMemory::default();
        let attack = memory.another_connection();
        let many = futures::future::join_all((0..2000).map(|_| attack.read(stalled(SMALL_STEP))));
        let burst = async {
            sleep(PAUSE_LIMIT / 4).await;
            let reviews = (0..8).map(async |_| {
                let read = memory.read(Full::new(Bytes::from(vec![b'x'; REVIEW]))).await;
                sleep(Duration::from_millis(1)).await;
                read.is_ok()
            });
            assert!(futures::future::join_all(reviews).await.into_iter().all(|is_read| is_read));
            let started = Instant::now();
            let slow = futures::future::join_all((0..10).map(async |_| {
                let read = memory.read(stalled(SMALL_STEP)).await;
                (matches!(read, Err(BodyError::NoMemory)), started.elapsed())
            }));
            let refused = slow.await.into_iter().filter(|slow| *slow == (true, Duration::ZERO)).count();
            assert_eq!(refused, 10 - OWN_KIB / 16 - WAITING_KIB / 32);
        };
        tokio::join!(many, burst);
        assert_eq!(free(&memory), ALL);
    }

    #[tokio::test(start_paused = true)]
    async fn small_bodies_of_others_leave_each_connection_its_own_memory() {
        let memory = BodyMemory::default();
        let attack = memory.another_connection();
        let many = futures::future::join_all((0..2000).map(|_| attack.read(stalled(SMALL_STEP))));
        let small = async {
            sleep(PAUSE_LIMIT / 2).await;
            assert_eq!(memory.pools.small.available_permits(), 0);
            let started = Instant::now();
            memory.read(chunks(2, REVIEW, Duration::ZERO)).await.unwrap();
            started.elapsed()
        };
        let (_, small) = tokio::join!(many, small);
        assert_eq!(small, Duration::ZERO);
        assert_eq!(free(&memory), ALL);
    }
}
