//! A boot's system calls.

/// What the loader writes to tracefs before it becomes /init: a file and its new line each.
pub const ORDERS: &str = "\
trace_clock mono
buffer_size_kb 8192
options/irq-info 0
kprobe_events p:bench/mount path_mount source=+0($arg1):string kind=+0($arg3):string data=+0($arg5):string
events/bench/mount/enable 1
events/raw_syscalls/enable 1
events/sched/sched_switch/enable 1
events/sched/sched_process_fork/enable 1
events/sched/sched_process_exec/enable 1
events/sched/sched_process_exit/enable 1
events/block/block_rq_issue/enable 1
events/block/block_rq_complete/enable 1
events/exceptions/page_fault_user/enable 1
";

/// And for the trace of the end: the kernel prints it all on the console when it restarts.
pub const ORDERS_AT_END: &str = "set_ftrace_filter kernel_restart:dump\n";
