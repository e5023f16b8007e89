//! Sends events to containerd, in order, through its ttrpc service. Waits for a containerd that is restarting.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use containerd_shim_protos::{
    Client, EventsClient,
    api::ForwardRequest,
    protobuf::{
        MessageFull,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::event::Envelope,
    ttrpc::context,
};

use crate::log;

/// How long an event is kept while containerd is down.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(200);
/// How long containerd may take to accept an event.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long sending the remaining events may take when the shim exits.
const FINISH: Duration = Duration::from_secs(5);

/// Wraps a message with its type.
pub fn any<M: MessageFull>(message: &M) -> Result<Any> {
    Ok(Any {
        type_url: M::descriptor().full_name().into(),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

/// A time in containerd's format.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    Timestamp {
        seconds: since.as_secs().try_into().unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().try_into().unwrap_or(0),
        ..Timestamp::default()
    }
}

/// Sends events in its own thread.
pub struct Publisher {
    namespace: String,
    queue: Mutex<Option<Sender<Envelope>>>,
    /// Number of events not sent yet.
    waiting: Arc<AtomicUsize>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

impl Publisher {
    /// Starts one for containerd's ttrpc socket at `address`.
    pub fn start(address: String, namespace: &str) -> Publisher {
        let (queue, events) = mpsc::channel::<Envelope>();
        let waiting = Arc::new(AtomicUsize::new(0));
        let left = waiting.clone();
        let sender = thread::spawn(move || {
            for event in events {
                let topic = event.topic.clone();
                if let Err(error) = send(&address, event) {
                    log::error(&error.context(format!("the event {topic} is lost")));
                }
                left.fetch_sub(1, Ordering::Release);
            }
        });
        Publisher {
            namespace: namespace.into(),
            queue: Mutex::new(Some(queue)),
            waiting,
            sender: Mutex::new(Some(sender)),
        }
    }

    /// Queues an event.
    pub fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let envelope = any(event).map(|any| Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: Some(any).into(),
            ..Envelope::default()
        });
        match (envelope, crate::service::lock(&self.queue).as_ref()) {
            (Ok(envelope), Some(queue)) => {
                self.waiting.fetch_add(1, Ordering::Relaxed);
                let _ = queue.send(envelope);
            }
            (Ok(_), None) => {}
            (Err(error), _) => log::error(&error),
        }
    }

    /// Waits, with a limit, until containerd has received all queued events.
    pub fn flush(&self) {
        let deadline = Instant::now() + FINISH;
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops accepting events, and waits, with a limit, until all were sent.
    pub fn finish(&self) {
        crate::service::lock(&self.queue).take();
        let deadline = Instant::now() + FINISH;
        if let Some(sender) = crate::service::lock(&self.sender).take() {
            while !sender.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

fn send(address: &str, event: Envelope) -> Result<()> {
    let request = ForwardRequest {
        envelope: Some(event).into(),
        ..ForwardRequest::default()
    };
    let deadline = Instant::now() + RETRY_TIMEOUT;
    loop {
        let sent = Client::connect(&format!("unix://{address}")).and_then(|client| {
            EventsClient::new(client).forward(context::with_duration(TIMEOUT), &request)
        });
        match sent {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("unable to reach containerd");
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}
