mod boots;
mod guest;
mod trace;
use anyhow::Result;
use boots::*;
fn main() -> Result<()> {
    let lab = Lab::new()?;
    let a: Vec<String> = std::env::args().collect();
    let product = Subject { name: "pigeon-init".into(), init: pigeon_lab::assets::build_dir().join("init"), config_path: "/pigeon/run.json".into(), kind: Kind::Product };
    let floor = Subject { name: "floor".into(), init: lab.floor(), config_path: String::new(), kind: Kind::Floor };
    let mode = match a[1].as_str() { "file" => Mode::File, "mmds" => Mode::Mmds, "reader" => Mode::Reader, "unpack" => Mode::Unpack, "serve" => Mode::Serve, "trace" => Mode::Trace, "trace-end" => Mode::TraceEnd, _ => Mode::TraceMmds };
    for _ in 0..a[3].parse::<usize>()? {
        let t = std::time::Instant::now();
        println!("{:?} {:?}", lab.boot(if a[2] == "floor" { &floor } else { &product }, mode)?, t.elapsed());
    }
    Ok(())
}
