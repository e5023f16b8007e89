//! `src/api/openapi.yaml` compared with the API's routes, and with the responses of a running VM.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use pigeon_lab::{
    Vm,
    disk::{Image, Tree},
    http::{Client, Response},
    vsock::API_PORT,
    ws::{Socket, handshake},
};
use serde_json::{Map, Value, json};

/// Long, as other VMs may run at the same time.
const TIMEOUT: Duration = Duration::from_secs(180);

/// An operation's method and path, as in the description: `("GET", "/v1/sessions/{id}")`.
type Operation = (String, String);

/// The value at a path of keys.
fn at<'v>(value: &'v Value, keys: &[&str]) -> Option<&'v Value> {
    keys.iter().try_fold(value, |value, key| value.get(key))
}

fn pairs(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flatten()
}

/// Forbids unknown members: clients must accept them, but the init must not send them.
fn close(schema: &mut Value) {
    if schema.get("properties").is_some() && schema.get("additionalProperties").is_none() {
        schema["additionalProperties"] = json!(false);
    }
    match schema {
        Value::Object(members) => members.values_mut().for_each(close),
        Value::Array(members) => members.iter_mut().for_each(close),
        _ => {}
    }
}

struct Description {
    root: Value,
    /// `components`, for responses.
    closed: Value,
}

impl Description {
    fn read() -> Result<Self> {
        let root: Value = serde_saphyr::from_str(include_str!("../../src/api/openapi.yaml"))?;
        let mut closed = root["components"].clone();
        close(&mut closed["schemas"]);
        Ok(Self { root, closed })
    }

    /// Resolves a value that may be a reference.
    fn resolve<'d>(&'d self, value: &'d Value) -> Result<&'d Value> {
        let Some(reference) = value.get("$ref").and_then(Value::as_str) else {
            return Ok(value);
        };
        let pointer = reference.strip_prefix('#').context("not in here")?;
        self.root
            .pointer(pointer)
            .with_context(|| format!("no {reference}"))
    }

    fn operations(&self) -> BTreeMap<Operation, &Value> {
        let mut operations = BTreeMap::new();
        for (path, item) in pairs(self.root.get("paths")) {
            for (method, operation) in pairs(Some(item)) {
                if method != "parameters" {
                    operations.insert((method.to_uppercase(), path.clone()), operation);
                }
            }
        }
        operations
    }

    /// Parameters of an operation, including its path's.
    fn parameters<'d>(&'d self, path: &str, operation: &'d Value) -> Result<Vec<&'d Value>> {
        let shared = at(&self.root, &["paths", path, "parameters"]);
        let own = operation.get("parameters");
        let lists = [shared, own].into_iter().flatten();
        let all = lists.filter_map(Value::as_array).flatten();
        all.map(|parameter| self.resolve(parameter)).collect()
    }

    /// Fails unless a value conforms to a schema.
    fn validate(&self, schema: &Value, value: &Value, is_reply: bool) -> Result<()> {
        let mut schema = schema.clone();
        let components = match is_reply {
            true => {
                close(&mut schema);
                &self.closed
            }
            false => &self.root["components"],
        };
        let whole = json!({"allOf": [schema], "components": components});
        let validator = jsonschema::draft202012::new(&whole).context("not a schema")?;
        let faults: Vec<String> = validator
            .iter_errors(value)
            .map(|fault| format!("{}: {fault}", fault.instance_path()))
            .collect();
        ensure!(faults.is_empty(), "{faults:?}");
        Ok(())
    }

    /// The same for a value that is not JSON.
    fn validate_text(&self, schema: &Value, text: &str) -> Result<()> {
        let value = match self.resolve(schema)?.get("type").and_then(Value::as_str) {
            Some("integer") => serde_json::from_str(text).unwrap_or(json!(text)),
            _ => json!(text),
        };
        self.validate(schema, &value, false)
    }

    /// A request that the init accepts must conform to the description, and an invalid one must not.
    fn check_request(&self, call: &Call) -> Result<()> {
        let operation = self.operation(call)?;
        let mut faults = vec![];
        let mut note =
            |checked: Result<()>| faults.extend(checked.err().map(|why| why.to_string()));
        let (_, query) = call.target.split_once('?').unwrap_or((call.target, ""));
        let mut given: BTreeMap<String, String> = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.replace("%2F", "/")))
            .collect();
        for parameter in self.parameters(call.path, operation)? {
            let name = parameter["name"].as_str().context("a name")?;
            let value = match parameter["in"].as_str() {
                Some("query") => given.remove(name),
                Some("header") => {
                    let found = call.headers.iter().find(|(header, _)| *header == name);
                    found.map(|(_, value)| value.to_string())
                }
                Some("path") => call.target.rsplit('/').next().map(String::from),
                other => anyhow::bail!("a parameter in {other:?}"),
            };
            match value {
                Some(value) => note(self.validate_text(&parameter["schema"], &value)),
                None if parameter["required"] == true => note(Err(anyhow::anyhow!("no {name}"))),
                None => {}
            }
        }
        ensure!(given.is_empty(), "{given:?} is not described");
        let body = operation.get("requestBody");
        let schema = body.and_then(|body| at(body, &["content", "application/json", "schema"]));
        match (schema, serde_json::from_slice(call.body)) {
            (Some(schema), Ok(value)) => note(self.validate(schema, &value, false)),
            (Some(_), Err(_)) if !call.body.is_empty() => note(Err(anyhow::anyhow!("not JSON"))),
            (Some(_), Err(_)) => {
                ensure!(at(operation, &["requestBody", "required"]) != Some(&json!(true)))
            }
            (None, _) if body.is_none() && !call.body.is_empty() => {
                note(Err(anyhow::anyhow!("it has no body")));
            }
            (None, _) => {}
        }
        match call.is_wrong {
            true => ensure!(!faults.is_empty(), "the request is as described"),
            false => ensure!(
                faults.is_empty(),
                "the request is not as described: {faults:?}"
            ),
        }
        Ok(())
    }

    /// A HEAD without a description of its own is described as the GET.
    fn operation(&self, call: &Call) -> Result<&Value> {
        let item = at(&self.root, &["paths", call.path]).context("no such path")?;
        let own = item.get(call.method.to_lowercase());
        let head = item.get("get").filter(|_| call.method == "HEAD");
        own.or(head).context("no such operation")
    }

    fn check_reply(&self, call: &Call, reply: &Response) -> Result<()> {
        let status = reply.status.to_string();
        // By its status: a range only describes errors that any request can get.
        let response = at(self.operation(call)?, &["responses", &status]);
        let response =
            self.resolve(response.with_context(|| format!("{status} is not described"))?)?;
        for (name, header) in pairs(response.get("headers")) {
            match reply.header(name) {
                Some(value) => self
                    .validate_text(&header["schema"], value)
                    .with_context(|| format!("the header {name}"))?,
                None => ensure!(header["required"] != true, "no header {name}"),
            }
        }
        let Some((media_type, content)) = pairs(response.get("content")).next() else {
            ensure!(
                reply.body.is_empty(),
                "a body is not described: {}",
                reply.text()
            );
            return Ok(());
        };
        assert_eq!(reply.header("content-type"), Some(media_type.as_str()));
        match content.get("schema") {
            Some(schema) if call.method != "HEAD" => self.validate(schema, &reply.json()?, true),
            _ => Ok(()),
        }
    }

    /// Fails unless a WebSocket message conforms to its schema.
    fn check_message(&self, name: &str, message: &Value) -> Result<()> {
        let schema = json!({"$ref": format!("#/components/schemas/{name}")});
        self.validate(&schema, message, true)
            .with_context(|| format!("{name}: {message}"))
    }
}

/// A request and the expected status.
struct Call<'a> {
    method: &'a str,
    /// As in the description.
    path: &'a str,
    /// As it is sent.
    target: &'a str,
    headers: &'a [(&'a str, &'a str)],
    body: &'a [u8],
    /// The request itself is invalid.
    is_wrong: bool,
    status: u16,
}

/// Checks each call, and records its operation.
struct Checker<'d> {
    description: &'d Description,
    operations: BTreeSet<Operation>,
}

impl Checker<'_> {
    fn call(&mut self, vm: &mut Vm, call: Call) -> Result<Response> {
        let reply = vm
            .api()?
            .request(call.method, call.target, call.headers, call.body)?;
        let what = || {
            format!(
                "{} {} {}: {reply}",
                call.method,
                call.target,
                call.body.escape_ascii()
            )
        };
        ensure!(
            reply.status == call.status,
            "{}, and not {}",
            what(),
            call.status
        );
        self.description.check_request(&call).with_context(what)?;
        self.description
            .check_reply(&call, &reply)
            .with_context(what)?;
        if reply.status < 300 {
            self.operations
                .insert((call.method.into(), call.path.into()));
        }
        Ok(reply)
    }
}

/// The routes in the source of the init's table: all of them, regardless of features.
fn routes() -> Vec<Operation> {
    let source = include_str!("../../src/api/routes.rs");
    let table = source
        .split("const ROUTES")
        .nth(1)
        .and_then(|rest| rest.split("];").next());
    // Quoted strings, each with the text after it: a path and its methods. Names of features are quoted, too.
    let pieces: Vec<_> = table.expect("a table").split('"').skip(1).collect();
    let mut routes = vec![];
    for piece in pieces.chunks_exact(2) {
        let path = match piece[0] {
            // A path that ends with `/` is a prefix.
            "/v1/sessions/" => "/v1/sessions/{id}",
            path => path,
        };
        if !path.starts_with('/') {
            continue;
        }
        for entry in piece[1].split("Method::").skip(1) {
            let method = entry.split(',').next().expect("a method").to_uppercase();
            // A HEAD is only described if it differs from the GET.
            if method != "HEAD" {
                routes.push((method, path.to_owned()));
            }
        }
    }
    routes
}

#[test]
fn every_route_is_described_and_nothing_else() -> Result<()> {
    let description = Description::read()?;
    let routes: BTreeSet<Operation> = routes().into_iter().collect();
    assert!(routes.len() > 10, "{routes:?}");
    let described: BTreeSet<Operation> = description.operations().into_keys().collect();
    // A HEAD is a GET without the body.
    for (method, path) in described.difference(&routes) {
        let get = ("GET".to_owned(), path.clone());
        assert!(
            method == "HEAD" && routes.contains(&get),
            "no route: {method} {path}"
        );
    }
    let missing: Vec<_> = routes.difference(&described).collect();
    assert!(missing.is_empty(), "not described: {missing:?}");

    // Operation IDs are unique, and all references exist.
    let mut names = BTreeSet::new();
    for ((method, path), operation) in description.operations() {
        let name = operation["operationId"]
            .as_str()
            .context("no operationId")?;
        assert!(names.insert(name.to_owned()), "{name} twice");
        let success = pairs(operation.get("responses")).any(|(status, _)| status < &"3".to_owned());
        assert!(success, "{method} {path} cannot succeed");
    }
    let mut open = vec![&description.root];
    while let Some(value) = open.pop() {
        description.resolve(value)?;
        match value {
            Value::Object(members) => open.extend(members.values()),
            Value::Array(members) => open.extend(members),
            _ => {}
        }
    }
    Ok(())
}

/// A JSON body.
fn body(value: Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

#[test]
fn a_running_vm_responds_as_described() -> Result<()> {
    let description = Description::read()?;
    let mut checker = Checker {
        description: &description,
        operations: BTreeSet::new(),
    };
    let root = Image::ext4(&Tree::busybox()?, 48)?;
    let config =
        json!({"ExecOverride": ["/bin/sh", "-c", "trap '' HUP; echo hello; sleep 100000"]});
    let mut vm = Vm::builder()
        .config(&config)
        .disk(&root)
        .nic()
        .arg("PIGEON_EXIT_LINGER_MS=600000")
        .timeout(TIMEOUT)
        .start()?;

    let empty = Vec::new();
    // Method, path, query, body, status; a 400 means an invalid request, unless a name is unknown.
    let get = |path, query| ("GET", path, query, empty.clone(), 200);
    let file = |query| ("PUT", "/v1/files", query, b"hello".to_vec(), 201);
    let post = |path, value, status| ("POST", path, "", body(value), status);
    let delete = |path, query, status| ("DELETE", path, query, empty.clone(), status);
    let large = vec![b'x'; 300_000];
    let much = "yes | head -c 3000000; yes | head -c 3000000 >&2; sleep 9";
    let calls = [
        get("/v1/status", ""),
        ("HEAD", "/v1/status", "", empty.clone(), 200),
        post("/v1/signals", json!({"signal": 1}), 200),
        post("/v1/signals", json!({"signal": 0}), 400),
        post("/v1/signals", json!({"signal": "HUP"}), 400),
        post("/v1/signals", json!({}), 400),
        ("POST", "/v1/signals", "", b"{".to_vec(), 400),
        post("/v1/exec", json!({"cmd": ["true"]}), 200),
        post(
            "/v1/exec",
            json!({"cmd": ["sh", "-c", much], "env": ["A=b"], "cwd": "/tmp", "user": "app", "timeout_ms": 4000}),
            200,
        ),
        post("/v1/exec", json!({"cmd": ["sh", "-c", "kill -9 $$"]}), 200),
        post("/v1/exec", json!({"cmd": ["nothing"]}), 500),
        post("/v1/exec", json!({"cmd": []}), 400),
        post("/v1/exec", json!({"cmd": "true"}), 400),
        post(
            "/v1/exec",
            json!({"cmd": ["true"], "timeout_ms": 86_400_001}),
            400,
        ),
        post("/v1/exec", json!({"cmd": ["true"], "env": "A=b"}), 400),
        get("/v1/sessions", ""),
        delete("/v1/sessions/{id}", "none", 404),
        get("/v1/logs", ""),
        get("/v1/logs", "?offset=3&follow=0"),
        ("GET", "/v1/logs", "?offset=-1", empty.clone(), 400),
        ("GET", "/v1/logs", "?follow=yes", empty.clone(), 400),
        file("?path=/tmp/a/file&mode=0640&user=app:staff"),
        (
            "PUT",
            "/v1/files",
            "?path=/tmp/a/file",
            b"again".to_vec(),
            200,
        ),
        (
            "PUT",
            "/v1/files",
            "?path=/tmp/x&mode=0888",
            b"x".to_vec(),
            400,
        ),
        ("PUT", "/v1/files", "?path=tmp/x", b"x".to_vec(), 400),
        ("PUT", "/v1/files", "?path=/tmp/a", b"x".to_vec(), 409),
        get("/v1/files", "?path=%2Ftmp%2Fa%2Ffile"),
        ("GET", "/v1/files", "?path=tmp/x", empty.clone(), 400),
        ("GET", "/v1/files", "", empty.clone(), 400),
        ("GET", "/v1/files", "?path=/none", empty.clone(), 404),
        ("GET", "/v1/files", "?path=/tmp", empty.clone(), 409),
        ("HEAD", "/v1/files", "?path=/tmp/a/file", empty.clone(), 200),
        ("HEAD", "/v1/files", "?path=tmp", empty.clone(), 400),
        ("HEAD", "/v1/files", "?path=/none", empty.clone(), 404),
        ("HEAD", "/v1/files", "?path=/tmp", empty.clone(), 409),
        get("/v1/sysinfo", ""),
        post(
            "/v1/mounts",
            json!({"FSType": "tmpfs", "MountPath": "/small", "Options": "size=64k"}),
            200,
        ),
        ("PUT", "/v1/files", "?path=/small/x", large, 507),
        post(
            "/v1/mounts",
            json!({"FSType": "tmpfs", "MountPath": "/small"}),
            409,
        ),
        post(
            "/v1/mounts",
            json!({"FSType": "tmpfs", "MountPath": "/fixed", "ReadOnly": true}),
            200,
        ),
        ("PUT", "/v1/files", "?path=/fixed/x", b"x".to_vec(), 403),
        post(
            "/v1/mounts",
            json!({"DevicePath": "/dev/vdz", "MountPath": "/x"}),
            500,
        ),
        post(
            "/v1/mounts",
            json!({"DevicePath": "vdz", "MountPath": "/x"}),
            400,
        ),
        post("/v1/mounts", json!({"DevicePath": "/dev/vdz"}), 400),
        post(
            "/v1/mounts",
            json!({"DevicePath": "/dev/vdz", "MountPath": "/x", "FSType": "a/b"}),
            400,
        ),
        delete("/v1/mounts", "?path=/small", 200),
        delete("/v1/mounts", "?path=/small", 404),
        delete("/v1/mounts", "?path=/proc", 409),
        delete("/v1/mounts", "?path=small", 400),
        delete("/v1/mounts", "", 400),
        ("DELETE", "/v1/mounts", "?path=/fixed", b"{}".to_vec(), 400),
        post("/v1/snapshot/cancel", json!({"token": "a1"}), 409),
        post("/v1/snapshot/prepare", json!({}), 400),
        post(
            "/v1/snapshot/prepare",
            json!({"token": "a1", "timeout_ms": 60_000, "sync": false, "hold_ms": 600_000}),
            200,
        ),
        post("/v1/snapshot/prepare", json!({"token": "a2"}), 409),
        post("/v1/exec", json!({"cmd": ["true"]}), 409),
        post("/v1/snapshot/cancel", json!({"token": "a1"}), 200),
        post("/v1/restore", json!({"unix_us": -1}), 400),
        post(
            "/v1/restore",
            json!({"config": {"Hostname": "a/b", "RootDevice": "vda"}}),
            500,
        ),
        post(
            "/v1/restore",
            json!({"entropy": "AAECAwQFBgc=", "config": {"Hostname": "clone"}}),
            200,
        ),
        post(
            "/v1/stop",
            json!({"signal": "SIGNOTHING", "timeout_ms": -1}),
            400,
        ),
        post(
            "/v1/stop",
            json!({"signal": "SIGKILL", "timeout_ms": 1000}),
            200,
        ),
        get("/v1/exit_code", ""),
        ("POST", "/v1/stop", "", empty.clone(), 409),
        post("/v1/signals", json!({"signal": 1}), 409),
    ];
    sessions(&description, &mut checker, &mut vm)?;
    methods(&description, &mut vm)?;
    for (method, path, query, body, status) in &calls {
        if *path == "/v1/exit_code" {
            // Its response ends the VM, so it comes last.
            continue;
        }
        let target = match path.split_once("{id}") {
            Some((start, _)) => format!("{start}{query}"),
            None => format!("{path}{query}"),
        };
        let call = Call {
            method,
            path,
            target: &target,
            headers: &[],
            body,
            is_wrong: *status == 400,
            status: *status,
        };
        checker.call(&mut vm, call)?;
        if *path == "/v1/stop" && *status == 200 {
            vm.wait_for("workload exited")?;
        }
    }
    let call = Call {
        method: "GET",
        path: "/v1/exit_code",
        target: "/v1/exit_code",
        headers: &[],
        body: b"",
        is_wrong: false,
        status: 200,
    };
    checker.call(&mut vm, call)?;

    // Every operation has succeeded once.
    let all: BTreeSet<Operation> = description.operations().into_keys().collect();
    let missing: Vec<_> = all.difference(&checker.operations).collect();
    assert!(missing.is_empty(), "never asked for: {missing:?}");
    Ok(())
}

/// WebSockets, their messages, and the list of named sessions.
fn sessions(description: &Description, checker: &mut Checker, vm: &mut Vm) -> Result<()> {
    let handshake = handshake();
    for (headers, status) in [(&handshake[..], 101), (&[][..], 426)] {
        let call = Call {
            method: "GET",
            path: "/v1/ws/exec",
            target: "/v1/ws/exec",
            headers,
            body: b"",
            is_wrong: status == 426,
            status,
        };
        checker.call(vm, call)?;
    }
    let first = |first: Value| -> Result<Value> {
        description.check_message("SessionRequest", &first)?;
        Ok(first)
    };
    let mut open = |message: &Value| -> Result<Socket> {
        let mut socket = Socket::open(vm.connect(API_PORT)?, "/v1/ws/exec")?;
        socket.text(message)?;
        Ok(socket)
    };
    let mut terminal = open(&first(json!({
        "command": ["sh", "-c", "read -r line; exit 3"], "tty": true, "cols": 80, "rows": 24,
        "env": ["A=b"], "cwd": "/tmp", "user": "app", "id": "terminal-1",
    }))?)?;
    let mut ended = open(&first(
        json!({"command": ["true"], "id": "ended", "streams": true}),
    )?)?;
    let mut killed = open(&first(json!({"command": ["sh", "-c", "kill -9 $$"]}))?)?;
    let mut failed = open(&first(json!({"command": ["nothing"]}))?)?;
    let end = killed.wait_end()?;
    description.check_message("SessionExit", &end.message.context("no exit")?)?;
    let end = failed.wait_end()?;
    description.check_message("SessionError", &end.message.context("no error")?)?;
    assert_eq!(end.close, Some(1011));
    let end = ended.wait_end()?;
    description.check_message("SessionExit", &end.message.context("no exit")?)?;
    for wrong in [
        json!({}),
        json!({"command": []}),
        json!({"command": ["true"], "attach": "ended"}),
        json!({"command": ["true"], "id": "a b"}),
        json!({"command": ["true"], "rows": 65_536}),
    ] {
        assert!(
            description.check_message("SessionRequest", &wrong).is_err(),
            "{wrong}"
        );
        let end = open(&wrong)?.wait_end()?;
        description.check_message("SessionError", &end.message.context("no error")?)?;
    }

    // The list has a running and an exited session.
    drop(open(&first(json!({"command": ["true"], "id": "quick"}))?)?);
    let list = |vm: &mut Vm, checker: &mut Checker| -> Result<Value> {
        let call = Call {
            method: "GET",
            path: "/v1/sessions",
            target: "/v1/sessions",
            headers: &[],
            body: b"",
            is_wrong: false,
            status: 200,
        };
        checker.call(vm, call)?.json()
    };
    let start = std::time::Instant::now();
    loop {
        let list = list(vm, checker)?;
        let list = list.as_array().context("a list")?;
        let exits: Vec<_> = list
            .iter()
            .map(|session| session["exit"].is_null())
            .collect();
        if exits.contains(&true) && exits.contains(&false) {
            break;
        }
        ensure!(start.elapsed() < TIMEOUT, "{list:?}");
    }
    let resize = json!({"cols": 100, "rows": 30});
    description.check_message("SessionControl", &resize)?;
    terminal.text(&resize)?;
    for id in ["terminal-1", "quick"] {
        let target = format!("/v1/sessions/{id}");
        let call = Call {
            method: "DELETE",
            path: "/v1/sessions/{id}",
            target: &target,
            headers: &[],
            body: b"",
            is_wrong: false,
            status: 200,
        };
        checker.call(vm, call)?;
    }
    Ok(())
}

/// Each path allows the described methods, and each operation describes the errors that any request can get.
fn methods(description: &Description, vm: &mut Vm) -> Result<()> {
    let mut api: Client<UnixStream> = vm.api()?;
    let none = Map::new();
    let paths = description.root["paths"].as_object().unwrap_or(&none);
    for (path, item) in paths {
        let mut described: BTreeSet<String> = pairs(Some(item))
            .map(|(method, _)| method.to_uppercase())
            .filter(|method| method != "PARAMETERS")
            .collect();
        if described.contains("GET") && path != "/v1/ws/exec" {
            described.insert("HEAD".into());
        }
        let reply = api.request("PATCH", &path.replace("{id}", "x"), &[], b"")?;
        assert_eq!(reply.status, 405, "{path}: {reply}");
        let allowed = reply.header("allow").context("no Allow")?;
        let allowed: BTreeSet<String> = allowed.split(", ").map(String::from).collect();
        assert_eq!(allowed, described, "{path}");
        let error = &description.root["components"]["schemas"]["Error"];
        description.validate(error, &reply.json()?, true)?;
    }
    for ((method, path), operation) in description.operations() {
        for range in ["4XX", "5XX"] {
            assert!(
                at(operation, &["responses", range]).is_some(),
                "{method} {path}: {range}"
            );
        }
    }
    Ok(())
}
